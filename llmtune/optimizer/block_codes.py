"""Numbers in 8 bits: codes of a table with an fp32 scale for each block of 256 elements.

The table is the dynamic tree of "8-bit Optimizers via Block-wise Quantization"
(https://arxiv.org/abs/2110.02861, section 1.3): seven decades below the block's largest number,
with twice as many codes in each as in the one below. Two codes differ from the paper's and from
bitsandbytes' (``functional.py: create_dynamic_map``):

* The signed table ends with -1 as it begins with 1. The block's largest number is then always one
  of the table, its scale is found again when decoded numbers are encoded, and so are all codes:
  encoding what was decoded changes nothing. bitsandbytes' table ends with -0.993.
* The unsigned table has no zero. A second moment that was rounded to zero beside a first one that
  was not would divide by epsilon alone, a step of any length ("Memory Efficient Optimizers with
  4-bit States", https://arxiv.org/abs/2309.01507, section 3.3). A block of zeros has the scale 0.
"""

from __future__ import annotations

import math
from functools import cache

import torch

from llmtune.optimizer.storage import BLOCK_ELEMENTS, Storage

#: A block whose largest number is below this is stored as zeros: its smaller ones would be
#: denormal, and their codes would not be found again.
SMALLEST_SCALE = 1e-30

_DECADES = 7


def count_blocks(start: int, numel: int) -> int:
    """Count the blocks that elements ``[start, start + numel)`` of a parameter touch."""
    return math.ceil((start + numel) / BLOCK_ELEMENTS) - start // BLOCK_ELEMENTS


def encode_blocks(values: torch.Tensor, storage: Storage) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode whole blocks.

    A number becomes the nearest of the table to its bf16 value, divided by the scale.

    Args:
        values: Shape (blocks, 256), fp32.

    Returns:
        Codes, shape (blocks, 256), uint8, and scales, shape (blocks,), fp32.
    """
    scales = values.abs().amax(dim=1)
    scales.masked_fill_(scales < SMALLEST_SCALE, 0)
    divisors = scales.masked_fill(scales == 0, 1)
    numbers = (values / divisors[:, None]).bfloat16().view(torch.int16).to(torch.int32)
    numbers += 2**15
    codes = _codes(storage.signed, values.device).index_select(0, numbers.view(-1))
    return codes.view_as(values), scales


def decode_blocks(codes: torch.Tensor, scales: torch.Tensor, storage: Storage) -> torch.Tensor:
    """Decode whole blocks. Shapes (blocks, 256) and (blocks,); fp32 of the first shape."""
    table = _table(storage.signed).to(codes.device)
    values = table.index_select(0, codes.view(-1).to(torch.int32)).view(codes.shape)
    return values.mul_(scales[:, None])


def decode_slice(
    codes: torch.Tensor, scales: torch.Tensor, start: int, storage: Storage
) -> torch.Tensor:
    """Decode elements of a parameter.

    Args:
        codes: Those of the elements from ``start`` on. Shape (numel,).
        scales: Those of the blocks that they touch. Shape (blocks,).

    Returns:
        Shape (numel,), fp32.
    """
    lead = start % BLOCK_ELEMENTS
    padded = codes.new_zeros(BLOCK_ELEMENTS * len(scales))
    padded[lead : lead + len(codes)] = codes
    decoded = decode_blocks(padded.view(-1, BLOCK_ELEMENTS), scales, storage)
    return decoded.view(-1)[lead : lead + len(codes)]


@cache
def _table(signed: bool) -> torch.Tensor:
    """Return the numbers of all codes, in order, between -1 and 1. Shape (256,)."""
    positive: list[float] = []
    for decade in range(_DECADES):
        count = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        means = (edges[1:] + edges[:-1]) / 2
        positive += (10.0 ** (decade + 1 - _DECADES) * means).tolist()
    below = [-1.0, *(-number for number in reversed(positive[:-1])), 0.0] if signed else [1e-7]
    return torch.tensor([*below, *positive, 1.0], dtype=torch.float32)


@cache
def _codes(signed: bool, device: torch.device) -> torch.Tensor:
    """Return the nearest code of each number of bf16, by its bits. Shape (65536,), uint8."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    table = _table(signed)
    middles = (table[1:] + table[:-1]) / 2
    nearest = torch.bucketize(numbers.float().nan_to_num(0.0), middles)
    return nearest.to(torch.uint8).to(device)

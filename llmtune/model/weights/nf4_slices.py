"""Quantize a slice of a weight to NF4, with the bits that bitsandbytes gives the whole weight.

A scale depends on the 64 numbers of its block alone, so that a rank quantizes the blocks of its own
slice. Double quantization subtracts the mean of all scales: ranks exchange the scales of a weight,
which are a sixteenth of its elements, and never its numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llmtune.tuner.nf4_layout import BLOCK_BYTES, BLOCK_SIZE, NESTED_BLOCK_SIZE, Nf4Layout

#: Elements that are read and quantized at once; bitsandbytes takes 16 bytes of temporary memory
#: for each.
CHUNK_ELEMENTS = 1 << 20


def load_bitsandbytes() -> Any:
    """Import ``bitsandbytes.functional`` without its warning about inference kernels on a CPU."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    finally:
        logger.setLevel(level)
    return functional


@dataclass(frozen=True, slots=True, kw_only=True)
class Nf4Weight:
    """A weight that is quantized while it is read."""

    layout: Nf4Layout
    read: Callable[[int, int], torch.Tensor]
    """Reads elements of the flattened weight, by the first index and the count, on the host."""
    dtype: torch.dtype
    """The dtype from which it is quantized: the training's."""
    device: torch.device
    """The device that quantizes it."""
    gather: Callable[[torch.Tensor], torch.Tensor] | None
    """Joins the tensors of all ranks, in their order, on every rank; on the host.

    None where a rank reads the whole parameter.
    """

    def read_stored(self, start: int, count: int) -> torch.Tensor:
        """Quantize a slice of the parameter that holds the weight. Collective.

        The slices of all ranks, one behind the other, cover the parameter.

        Args:
            start: The first element, in elements of ``dtype``.
            count: 0 on a rank without a slice.

        Returns:
            The slice, with zeros behind the buffer's end. Shape (count,).
        """
        width = self.dtype.itemsize
        first, last = start * width, (start + count) * width
        stored = torch.zeros(last - first, dtype=torch.uint8, device=self.device)
        codes, absmax = self._quantize_blocks(first, last)
        stored[: len(codes)] = codes

        # The scales lie behind the numbers; whose slice reaches there computes them all.
        layout = self.layout
        if self.gather is not None:
            absmax = self.gather(absmax.cpu())
        if last > layout.scales_start:
            scales = _pack_scales(absmax.to(self.device), layout)
            begin, end = max(first, layout.scales_start), min(last, layout.nbytes)
            if end > begin:
                offset = layout.scales_start
                stored[begin - first : end - first] = scales[begin - offset : end - offset]
        return stored.view(self.dtype)

    def _quantize_blocks(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize the blocks of the bytes from ``first`` to ``last``.

        Returns:
            These bytes, and the scales of the blocks that begin among them. A block that is cut
            belongs to the slice in which it begins.
        """
        functional = load_bitsandbytes()
        last = min(last, self.layout.code_bytes)
        if first >= last:
            empty = torch.empty(0, device=self.device)
            return empty.to(torch.uint8), empty
        first_block = first // BLOCK_BYTES
        begin = first_block * BLOCK_SIZE
        end = min(-(-last // BLOCK_BYTES) * BLOCK_SIZE, self.layout.numel)
        packed, scales = [], []
        for position in range(begin, end, CHUNK_ELEMENTS):
            values = self.read(position, min(CHUNK_ELEMENTS, end - position))
            four_bits, state = functional.quantize_4bit(
                values.to(self.device, self.dtype), blocksize=BLOCK_SIZE, quant_type="nf4"
            )
            packed.append(four_bits.view(-1))
            scales.append(state.absmax)
        offset = first - first_block * BLOCK_BYTES
        absmax = torch.cat(scales)[1 if offset else 0 :]
        return torch.cat(packed)[offset : offset + last - first], absmax


def _pack_scales(absmax: torch.Tensor, layout: Nf4Layout) -> torch.Tensor:
    """Return the bytes behind the 4-bit numbers: all scales, quantized if the layout asks for it.

    Follows ``bitsandbytes.functional.quantize_4bit`` with ``compress_statistics``.
    """
    if not layout.double_quant:
        return absmax.view(torch.uint8)
    functional = load_bitsandbytes()
    mean = absmax.mean()
    in_8_bits, nested = functional.quantize_blockwise(absmax - mean, blocksize=NESTED_BLOCK_SIZE)
    return torch.cat(
        [nested.absmax.view(torch.uint8), mean.reshape(1).view(torch.uint8), in_8_bits]
    )

"""Numbers in blocks of 8 bits: what is decoded and encoded again is the same, and nothing becomes
zero that would be a divisor.
"""

from __future__ import annotations

import pytest
import torch

from llmtune.optimizer.block_codes import (
    SMALLEST_SCALE,
    count_blocks,
    decode_blocks,
    decode_slice,
    encode_blocks,
)
from llmtune.optimizer.storage import BLOCK_ELEMENTS, SIGNED_8BIT, UNSIGNED_8BIT, Storage

BOTH = pytest.mark.parametrize("storage", [SIGNED_8BIT, UNSIGNED_8BIT], ids=lambda s: s.name)


def random_blocks(seed: int, storage: Storage, blocks: int = 16) -> torch.Tensor:
    """Blocks whose numbers lie far apart, of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(blocks, BLOCK_ELEMENTS, generator=generator)
    spread = torch.randn(blocks, BLOCK_ELEMENTS, generator=generator).mul(seed / 4).exp()
    size = 10.0 ** (40 * torch.rand(blocks, 1, generator=generator) - 35)
    values = values * spread * size
    return values if storage.signed else values.abs()


@BOTH
@pytest.mark.parametrize("seed", range(20))
def test_what_was_decoded_is_encoded_to_the_same_codes(seed: int, storage: Storage) -> None:
    codes, scales = encode_blocks(random_blocks(seed, storage), storage)
    decoded = decode_blocks(codes, scales, storage)
    again, same_scales = encode_blocks(decoded, storage)
    assert torch.equal(scales, same_scales)
    assert torch.equal(decoded, decode_blocks(again, same_scales, storage))
    assert torch.equal(codes[scales > 0], again[scales > 0])


@BOTH
@pytest.mark.parametrize("seed", range(20))
def test_numbers_are_near_and_the_largest_is_exact(seed: int, storage: Storage) -> None:
    values = random_blocks(seed, storage)
    codes, scales = encode_blocks(values, storage)
    decoded = decode_blocks(codes, scales, storage)
    # Half the widest gap of the table, and a rounding to bf16.
    widest = 0.0212 if storage.signed else 0.0071
    limit = ((widest / 2 + 2**-9) * scales).masked_fill(scales == 0, SMALLEST_SCALE)[:, None]
    assert ((decoded - values).abs() <= limit).all()
    large = scales > 0
    largest = values[large].abs().argmax(dim=1, keepdim=True)
    assert torch.equal(decoded[large].gather(1, largest), values[large].gather(1, largest))


def test_a_second_moment_never_becomes_zero_beside_others() -> None:
    values = torch.full((1, BLOCK_ELEMENTS), 1e-20)
    values[0, 0] = 1.0
    decoded = decode_blocks(*encode_blocks(values, UNSIGNED_8BIT), UNSIGNED_8BIT)
    assert decoded.min() > 0


@BOTH
@pytest.mark.parametrize("size", [0.0, 1e-38, 9e-31])
def test_a_block_of_nothing_is_zeros(size: float, storage: Storage) -> None:
    codes, scales = encode_blocks(torch.full((2, BLOCK_ELEMENTS), size), storage)
    assert not decode_blocks(codes, scales, storage).any()


@BOTH
@pytest.mark.parametrize(("start", "numel"), [(0, 700), (256, 256), (100, 1), (255, 2), (300, 900)])
def test_a_slice_is_decoded_by_its_place_in_the_parameter(
    start: int, numel: int, storage: Storage
) -> None:
    values = random_blocks(2, storage, 8)
    codes, scales = encode_blocks(values, storage)
    first = start // BLOCK_ELEMENTS
    part = decode_slice(
        codes.view(-1)[start : start + numel],
        scales[first : first + count_blocks(start, numel)],
        start,
        storage,
    )
    assert torch.equal(part, decode_blocks(codes, scales, storage).view(-1)[start : start + numel])

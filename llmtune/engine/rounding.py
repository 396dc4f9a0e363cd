"""Stochastic rounding to bf16, with random bits that are a function of where an element is.

A number is rounded up with a probability of its distance from the lower neighbor, so that the mean
is right, and what is smaller than a bf16 number's last digit is not lost. The bits follow from
seed, step, parameter and the element's place in it, and not from the layout: every stage, placement
and number of ranks rounds alike, on a CPU as on a GPU, and a resumed run continues with the same
bits. The host computes keys only, and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmtune.draws import Draw, torch_seed

#: Elements whose 16 bits are in a word of 64.
_LANES = 4

#: The constants of SplitMix64's finalizer (Steele, Lea and Flood 2014), as signed numbers: shift
#: and odd factor of each round.
_ROUNDS = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))
_LAST_SHIFT = 31


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Consecutive elements of a flattened parameter."""

    key: int
    """The key of seed, step and parameter (:func:`rounding_key`)."""
    first: int
    """The first element's place in the parameter."""
    numel: int
    gap: int = 0
    """Elements before it that belong to no parameter."""


def rounding_key(seed: int, step: int, name: str) -> int:
    """Return the key of a parameter's bits in a step, below 2**62."""
    return torch_seed(seed, Draw.rounding, step, name) >> 1


class RandomBits:
    """16 random bits for each element of some runs."""

    def __init__(self, runs: Sequence[Run], device: torch.device) -> None:
        """Number the words of all runs, and mix the numbers."""
        self._runs = runs
        ranges = [
            (run.first // _LANES, -(-(run.first + run.numel) // _LANES), run.key) for run in runs
        ]
        words = torch.empty(
            sum(last - first for first, last, _ in ranges), dtype=torch.int64, device=device
        )
        filled = 0
        for first, last, key in ranges:
            torch.arange(key + first, key + last, out=words[filled : filled + last - first])
            filled += last - first
        for shift, factor in _ROUNDS:
            _fold(words, shift).mul_(factor)
        self._words = _fold(words, _LAST_SHIFT)

    def take(self) -> torch.Tensor:
        """Return the bits as int32 below 2**16, and make others for the next call."""
        lanes = self._words.view(torch.int16)
        parts: list[torch.Tensor] = []
        filled = 0
        for run in self._runs:
            if run.gap:
                parts.append(lanes.new_zeros(run.gap))
            lead = run.first % _LANES
            parts.append(lanes[filled + lead : filled + lead + run.numel])
            filled += -(-(lead + run.numel) // _LANES) * _LANES
        bits = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(torch.int32)
        shift, factor = _ROUNDS[0]
        _fold(self._words, shift).mul_(factor)
        return bits.bitwise_and_(0xFFFF)


def round_stochastically(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Round fp32 numbers to bf16.

    The lower 16 bits of a number are its distance from the lower neighbor in bf16; a random number
    of 16 bits carries into the upper ones with that probability.

    Args:
        bits: int32, below 2**16; overwritten.
    """
    bits.add_(values.view(torch.int32)).bitwise_and_(-(2**16))
    return bits.view(torch.float32).bfloat16()


def _fold(words: torch.Tensor, shift: int) -> torch.Tensor:
    """Combine words with their own upper bits, in place: ``words ^= words >> shift``, unsigned."""
    upper = words >> shift
    upper.bitwise_and_((1 << (64 - shift)) - 1)
    return words.bitwise_xor_(upper)

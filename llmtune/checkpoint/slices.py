"""Put a tensor together from the mapped slices of many ranks, a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from llmtune.storage.tensors.row_blocks import row_ranges
from llmtune.storage.tensors.tensor_spec import TensorSpec


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """Elements of a flattened tensor from ``start`` on."""

    start: int
    values: torch.Tensor
    """One dimension."""

    @property
    def end(self) -> int:
        """Return the first element that is no longer in it."""
        return self.start + self.values.numel()


@dataclass(frozen=True, slots=True)
class PiecedTensor:
    """A tensor, and the slices that its elements are in."""

    spec: TensorSpec
    pieces: tuple[TensorSlice, ...]
    """The slices in order, without gap and without overlap."""

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield blocks of rows: views where a block is in one slice, copies where it is not."""
        shape = self.spec.shape
        width = math.prod(shape[1:])
        if not math.prod(shape):
            yield torch.empty(shape, dtype=self.spec.dtype)
            return
        for first, last in row_ranges(shape):
            block = self._elements(first * width, last * width)
            yield block.reshape(last - first, *shape[1:]) if shape else block.reshape(())

    def _elements(self, first: int, last: int) -> torch.Tensor:
        parts = [
            piece.values[max(first - piece.start, 0) : last - piece.start]
            for piece in self.pieces
            if piece.start < last and piece.end > first
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def find_gap(pieces: Sequence[TensorSlice], numel: int) -> str | None:
    """Find out why sorted slices are no tensor of ``numel`` elements; None where they are one."""
    reached = 0
    for piece in pieces:
        if piece.start != reached:
            kind = "missing" if piece.start > reached else "there twice"
            first, last = sorted((reached, piece.start))
            return f"elements {first} to {last} of {numel} are {kind}"
        reached = piece.end
    return None if reached == numel else f"it has {numel} elements, and {reached} are there"

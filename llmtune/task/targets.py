"""The targets of a batch: which logits are judged, and what they should have said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The targets of a batch, found on the host so that no step waits for a GPU."""

    positions: torch.Tensor
    """Of the judged logits, after all dimensions but the last are flattened, int64.

    Shape (targets,).
    """
    values: torch.Tensor
    """Tokens or classes, int64, shape (targets,); or numbers, fp32, shape (targets, outputs)."""
    weight: float
    """The divisor that makes a mean of the summed loss."""
    row_length: int
    """Logits per row of the batch: its tokens, or 1 where a row is judged as a whole."""

    def __len__(self) -> int:
        return len(self.positions)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Targets:
        """Apply a change, such as a copy to a device, to every tensor."""
        return replace(self, positions=change(self.positions), values=change(self.values))

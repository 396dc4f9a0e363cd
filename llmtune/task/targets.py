"""The targets of a batch: which logits are judged, and what they should have said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The targets of a batch, found on the host so that no step waits for a GPU."""

    positions: torch.Tensor
    """Positions of the judged logits, after all dimensions but the last are flattened, int64.

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

    def within(self, start: int, length: int) -> Targets:
        """Return the targets of some positions, as those of a row of that length.

        ``weight`` stays that of the batch.
        """
        mine = (self.positions >= start) & (self.positions < start + length)
        positions, values = self.positions[mine] - start, self.values[mine]
        return replace(self, positions=positions, values=values, row_length=length)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Targets:
        """Apply a change, such as a copy to a device, to every tensor."""
        return replace(self, positions=change(self.positions), values=change(self.values))


def next_token_targets(rows: Sequence[Any], length: int) -> Targets:
    """Find the targets of language modeling: trained tokens, from the positions before them.

    Args:
        rows: Each with ``ids`` and ``mask``; None for one that fills the batch up.
        length: Tokens of the padded rows.
    """
    import numpy as np
    import torch

    positions, tokens = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for index, row in enumerate(rows):
        if row is not None:
            columns = np.flatnonzero(row.mask[1:])
            positions.append(columns + index * length)
            tokens.append(row.ids[1:][columns].astype(np.int64))
    joined = torch.from_numpy(np.concatenate(positions))
    return Targets(
        positions=joined,
        values=torch.from_numpy(np.concatenate(tokens)),
        weight=len(joined),
        row_length=length,
    )

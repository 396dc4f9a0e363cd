"""Make the tensors of a forward pass from rows: padded, or packed.

In a packed row, positions restart at each document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmtune.data.load.batch import Batch, VarlenIndex
from llmtune.data.load.sequence_part import SequencePart
from llmtune.data.store.token_store import Row, Rows
from llmtune.task.targets import Targets, next_token_targets

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Collator:
    """Makes batches of rows."""

    pad_token_id: int
    varlen: bool = False
    """Flatten packed rows for attention that takes borders."""
    flat: bool = False
    """Flatten rows of one document each, so that there is no padding; needs ``varlen``."""
    masked: bool = False
    """Say where padding is.

    Causal models compute the same without it, and attention takes its fast kernels only where there
    is no mask.
    """
    token_types: bool = False
    """Say which tokens are of the second text of a pair."""
    part: SequencePart = field(default_factory=SequencePart)
    """The part of a flattened batch that is this rank's; the others' compute the rest."""
    find_targets: Callable[[Sequence[Row | None], int], Targets] = next_token_targets
    """Finds the targets of rows that are padded to a length."""
    find_weights: Callable[..., Any] | None = None
    """Finds the share of each row in the divisor of the loss, by its targets and its label."""

    def weigh(self, rows: Rows) -> NDArray[Any]:
        """Return the share of each row in the divisor of a step's loss. Shape (rows,).

        By default these are its trained tokens.
        """
        if self.find_weights is None:
            return rows.supervised_tokens
        weights: NDArray[Any] = self.find_weights(rows.supervised_tokens, rows.labels)
        return weights

    def collate(self, rows: Rows, numbers: Sequence[int | None]) -> Batch:
        """Make the batch of some rows; None makes an empty row, which trains nothing."""
        picked = [rows.row(number) if number is not None else None for number in numbers]
        return self.collate_rows(picked, rows.packed)

    def collate_rows(self, rows: Sequence[Row | None], packed: bool) -> Batch:
        """Make this rank's batch of rows; None is an empty row, which trains nothing."""
        alone = self.join if self.flat else self.pad
        batch = self.pack(rows) if packed else alone(rows)
        return self.part.cut(batch, self.pad_token_id)

    def pad(self, rows: Sequence[Row | None]) -> Batch:
        """One document a row."""
        input_ids = self._fill(rows)
        targets = self.find_targets(rows, input_ids.shape[1])
        attention_mask = torch.zeros_like(input_ids) if self.masked else None
        token_type_ids = torch.zeros_like(input_ids) if self.token_types else None
        for index, row in enumerate(rows):
            if attention_mask is not None:
                # One visible token of an empty row: attention over nothing is NaN.
                attention_mask[index, : len(row.ids) if row else 1] = 1
            if token_type_ids is not None and row is not None:
                token_type_ids[index, : len(row.ids)] = torch.tensor(row.second, dtype=torch.long)
        return Batch(
            input_ids=input_ids,
            targets=targets,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
        )

    def pack(self, rows: Sequence[Row | None]) -> Batch:
        """Pack several documents per row.

        The rest of a row is a document of padding, which trains nothing.
        """
        input_ids = self._fill(rows)
        height, width = input_ids.shape

        # The documents of all rows; the rest of a row is one more, of padding.
        lengths: list[int] = []
        for row in rows:
            documents = list(row.documents) if row else []
            rest = width - sum(documents)
            lengths += documents + ([rest] if rest else [])
        position_ids = _restarting_positions(lengths).view(height, width)
        targets = self.find_targets(rows, width)
        if not self.varlen:
            return Batch(input_ids=input_ids, targets=targets, position_ids=position_ids)
        shape = (1, height * width)
        return Batch(
            input_ids=input_ids.view(shape),
            targets=replace(targets, row_length=height * width),
            position_ids=position_ids.view(shape),
            varlen=_index_documents(lengths, [width] * height),
        )

    def join(self, rows: Sequence[Row | None]) -> Batch:
        """One document a row, one behind the other and without padding, as one row.

        An empty row is a document of one token, which trains nothing.
        """
        empty = np.array([self.pad_token_id])
        ids = [row.ids if row and len(row.ids) else empty for row in rows]
        lengths = [len(one) for one in ids]

        # Positions of targets, from rows of the same width to rows one behind the other.
        width = max(lengths)
        targets = self.find_targets(rows, width)
        shifts = torch.tensor([0, *lengths[:-1]]).cumsum(0) - torch.arange(len(rows)) * width
        positions = targets.positions + shifts[targets.positions // width]
        return Batch(
            input_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64))[None],
            targets=replace(targets, positions=positions, row_length=sum(lengths)),
            position_ids=_restarting_positions(lengths)[None],
            varlen=_index_documents(lengths, lengths),
        )

    def _fill(self, rows: Sequence[Row | None]) -> torch.Tensor:
        width = max((len(row.ids) for row in rows if row), default=1)
        input_ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.long)
        for index, row in enumerate(rows):
            if row is not None:
                input_ids[index, : len(row.ids)] = torch.tensor(row.ids, dtype=torch.long)
        return input_ids


def _index_documents(lengths: list[int], row_lengths: list[int]) -> VarlenIndex:
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return VarlenIndex(borders, max(lengths), tuple(row_lengths))


def _restarting_positions(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])

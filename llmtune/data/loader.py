"""Rows in a fixed order, batch by batch: a pure function of seed and step.

The order of rows knows nothing of ranks or micro-batches, and a position is a number. So resuming is starting at another
step, and any number of ranks sees the same global batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmtune.plan.batch import BatchPlan

if TYPE_CHECKING:
    from datasets import Dataset

#: Label of a position that is not trained; torch's own default.
IGNORE = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one forward pass, padded on the right. Shapes: (rows, longest row)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    """``input_ids`` where trained, ``IGNORE`` elsewhere; not shifted."""

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one rank does in one optimizer step."""

    micro_batches: list[Batch]
    trained_tokens: int
    """Of the whole global batch: the loss's denominator, the same on all ranks."""
    tokens: int
    """Of the whole global batch, padding excluded."""


class TrainLoader:
    """Global batches of the training rows, and this rank's share of them."""

    def __init__(
        self, rows: Dataset, batch: BatchPlan, rank: int, seed: int, pad_token_id: int, last_row: int | None = None
    ):
        """
        Args:
            last_row: Rows after which the stream ends, counted over epochs; the step that reaches it is smaller.
        """
        self.rows = rows
        self.batch = batch
        self.rank = rank
        self.seed = seed
        self.pad_token_id = pad_token_id
        self.last_row = last_row
        self._lengths = np.asarray(rows["length"])
        self._trained = np.asarray(rows["trained_tokens"])
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)

    def step(self, step: int) -> StepBatch:
        """The batch of optimizer step ``step``, counted from 0."""
        # Longest first: rows of a micro-batch, and those of the ranks at the same moment, are of like length, so that
        # little is padded and no rank waits. The sum that the step computes does not depend on it.
        chosen = sorted(self.row_indices(step), key=lambda row: (-self._lengths[row], row))
        micro, world = self.batch.micro_batch_size, self.batch.world_size
        slots: list[int | None] = [*chosen, *[None] * (self.batch.global_batch_size - len(chosen))]
        micro_batches = []
        for number in range(self.batch.accumulation_steps):
            start = (number * world + self.rank) * micro
            micro_batches.append(collate(self.rows, slots[start : start + micro], self.pad_token_id))
        index = np.asarray(chosen, dtype=np.int64)
        return StepBatch(micro_batches, int(self._trained[index].sum()), int(self._lengths[index].sum()))

    def row_indices(self, step: int) -> list[int]:
        """Rows of the global batch, in order; fewer than its size only in the last step of whole epochs."""
        size = self.batch.global_batch_size
        end = (step + 1) * size if self.last_row is None else min((step + 1) * size, self.last_row)
        return [self._row_at(position) for position in range(step * size, end)]

    def _row_at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._lengths))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self._lengths))
            self._epoch = epoch
        return int(self._order[offset])


def iterate_eval(
    rows: Dataset, batch_size: int, rank: int, world_size: int, pad_token_id: int, max_rows: int | None
) -> Iterator[Batch]:
    """This rank's evaluation batches, the same number on every rank, since ZeRO 3 gathers weights in each of them."""
    count = min(len(rows), max_rows or len(rows))
    # By length, so that little is padded.
    order = np.argsort(np.asarray(rows["length"])[:count], kind="stable").tolist()
    rounds = -(-count // (batch_size * world_size))
    for number in range(rounds):
        start = (number * world_size + rank) * batch_size
        chosen: list[int | None] = order[start : start + batch_size]
        yield collate(rows, chosen or [None], pad_token_id)


def collate(rows: Dataset, indices: list[int | None], pad_token_id: int) -> Batch:
    """Pad rows on the right; None makes an empty row, which trains nothing."""
    picked = [rows[index] if index is not None else None for index in indices]
    width = max((len(row["input_ids"]) for row in picked if row), default=1)
    input_ids = torch.full((len(picked), width), pad_token_id, dtype=torch.long)
    labels = torch.full((len(picked), width), IGNORE, dtype=torch.long)
    attention_mask = torch.zeros((len(picked), width), dtype=torch.long)
    for number, row in enumerate(picked):
        if row is None:
            # One visible token: attention over nothing is NaN.
            attention_mask[number, 0] = 1
            continue
        ids = torch.tensor(row["input_ids"], dtype=torch.long)
        mask = torch.tensor(row["mask"], dtype=torch.bool)
        input_ids[number, : len(ids)] = ids
        labels[number, : len(ids)] = torch.where(mask, ids, torch.tensor(IGNORE))
        attention_mask[number, : len(ids)] = 1
    return Batch(input_ids, attention_mask, labels)

"""Read rows in a fixed order, batch by batch: a pure function of seed and position.

The order of rows knows nothing of ranks or micro-batches, and a position is a number. So resuming
is starting at another position, and any number of ranks sees the same global batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llmtune.data.load.batch import Batch
from llmtune.data.load.collate import Collator
from llmtune.data.store.token_store import Rows
from llmtune.draws import Draw, generator
from llmtune.errors import CheckpointError
from llmtune.plan.batch_sizes import BatchPlan
from llmtune.plan.length.batch_schedule import BEGINNING, Reached, ScheduledBatch
from llmtune.process import die_with_parent

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """The micro-batches of one rank for one optimizer step."""

    micro_batches: list[Batch]
    loss_weight: float
    """Divisor of the summed loss of the whole global batch, the same on all ranks.

    It is the batch's trained tokens, or the weight of its rows.
    """
    tokens: int
    """Tokens of the whole global batch, padding excluded."""
    position: Mapping[str, Any]
    """Position in the data after this step, for the checkpoint."""
    rows: list[list[int | None]] = field(default_factory=list)
    """Number of each row of the micro-batches; None for rows that only fill up the batch."""

    def pin_memory(self) -> StepBatch:
        """Copy it into page-locked host memory."""
        return replace(self, micro_batches=[batch.pin_memory() for batch in self.micro_batches])


class Steps(Protocol):
    """The data of a run, step by step."""

    def from_position(
        self, position: Mapping[str, Any] | None, steps: int, reached: Reached = BEGINNING
    ) -> Iterator[StepBatch]:
        """Yield the next ``steps`` steps after a position; None is the beginning.

        Args:
            reached: The steps and tokens before it, which a growing batch depends on.
        """

    def locations(self, row: int) -> list[str]:
        """Return file and line of the documents of a row; none where that is not known."""


@dataclass(frozen=True, slots=True)
class LoaderSettings:
    """Settings for the processes that make batches ahead."""

    workers: int = 0
    """Processes of this rank that make batches; 0 for none."""
    pin_memory: bool = False


class TrainLoader:
    """Global batches of the training rows, and this rank's share of them."""

    def __init__(
        self,
        rows: Rows,
        batch: BatchPlan | ScheduledBatch,
        rank: int,
        seed: int,
        collator: Collator,
        last_row: int | None = None,
        settings: LoaderSettings = LoaderSettings(),
    ):
        """
        Args:
            last_row: Rows after which the stream ends, counted over epochs; the step that reaches
                it is smaller.
        """
        self.rows = rows
        scheduled = ScheduledBatch.of(batch)
        self.batch, self.schedule = scheduled.first, scheduled.schedule
        self.rank = rank
        self.seed = seed
        self.collator = collator
        self.last_row = last_row
        self.settings = settings
        self._lengths = rows.lengths
        self._weights = collator.weigh(rows)
        self._epoch = -1
        self._order: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def from_position(
        self, position: Mapping[str, Any] | None, steps: int, reached: Reached = BEGINNING
    ) -> Iterator[StepBatch]:
        """Yield the next ``steps`` steps after a position; None is the beginning.

        Args:
            reached: The steps and tokens before it, which a growing batch depends on.

        Raises:
            CheckpointError: The position is that of other rows.
        """
        first = 0
        if position is not None:
            there = {key: position.get(key) for key in ("rows", "seed")}
            here = {"rows": len(self.rows), "seed": self.seed}
            if there != here or not isinstance(position.get("next_row"), int):
                raise CheckpointError(
                    f"the checkpoint's place in the data is {dict(position)}, of other data than"
                    f" {here}"
                )
            first = int(position["next_row"])
        starts = itertools.islice(self.step_starts(first, reached), steps)
        yield from load(_StepsAt(self), starts, self.settings)

    def step_starts(
        self, first_row: int = 0, reached: Reached = BEGINNING
    ) -> Iterator[tuple[int, int]]:
        """Yield the first row of each step, counted over epochs, and its rows; without end."""
        steps, tokens = reached.steps, reached.tokens
        while True:
            size = self.schedule.rows_at(Reached(steps, tokens))
            yield first_row, size
            if self.schedule.counts_tokens:
                tokens += int(self._lengths[self.row_numbers(first_row, size)].sum())
            first_row += size
            steps += 1

    def step_at(self, first_row: int, size: int | None = None) -> StepBatch:
        """Return the step whose global batch begins at a row, counted over epochs.

        Args:
            size: Rows of the global batch; None for those of the first step.
        """
        # Longest first: rows of a micro-batch, and those of the ranks at the same moment, are of
        # like length, so that little is padded and no rank waits. The sum that the step computes
        # does not depend on it.
        numbers = self.row_numbers(first_row, size)
        chosen = sorted(numbers, key=lambda row: (-self._lengths[row], row))
        batch = self.batch if size is None else self.batch.resized(size)
        mine = share_of_rank(chosen, batch, self.rank)
        index = np.asarray(chosen, dtype=np.int64)
        position = {"next_row": first_row + len(numbers), "rows": len(self.rows), "seed": self.seed}
        return StepBatch(
            micro_batches=[self.collator.collate(self.rows, numbers) for numbers in mine],
            loss_weight=self._weights[index].sum().item(),
            tokens=int(self._lengths[index].sum()),
            position=position,
            rows=mine,
        )

    def locations(self, row: int) -> list[str]:
        """Return file and line of the documents of a row."""
        return [f"{file}:{line}" for file, line in self.rows.locations(row)]

    def row_numbers(self, first_row: int, size: int | None = None) -> list[int]:
        """Return the rows of the global batch, in order.

        There are fewer than its size only in the last step of whole epochs.
        """
        end = first_row + (self.batch.global_batch_size if size is None else size)
        end = end if self.last_row is None else min(end, self.last_row)
        return [self._row_at(position) for position in range(first_row, end)]

    def _row_at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._lengths))
        if epoch != self._epoch:
            self._order = generator(self.seed, Draw.order, epoch).permutation(len(self._lengths))
            self._epoch = epoch
        return int(self._order[offset])


def share_of_rank(rows: Sequence[Any], batch: BatchPlan, rank: int) -> list[list[Any]]:
    """Return the micro-batches of a rank out of the global batch; None fills it up.

    The ranks of a sequence group have the same rows.
    """
    slots: list[Any] = [*rows, *[None] * (batch.global_batch_size - len(rows))]
    micro, group = batch.micro_batch_size, rank // batch.sequence_parallel_size
    starts = [(number * batch.groups + group) * micro for number in range(batch.accumulation_steps)]
    return [slots[start : start + micro] for start in starts]


def load(items: Any, order: Iterable[Any] | None, settings: LoaderSettings) -> Iterator[Any]:
    """Yield the items of a torch data set in order; worker processes, if any, make them ahead."""
    # batch_size None: an item is a batch already.
    loader: DataLoader[Any] = DataLoader(
        items,
        batch_size=None,
        sampler=order,
        num_workers=settings.workers,
        pin_memory=settings.pin_memory,
        worker_init_fn=_start_worker if settings.workers else None,
        # DataLoader draws a seed for workers even if it has none. It must not come from the
        # generator that dropout uses.
        generator=torch.Generator(),
    )
    return iter(loader)


class _StepsAt(Dataset[StepBatch]):
    """A data set for torch's DataLoader: an item is the step of a first row and a size."""

    def __init__(self, loader: TrainLoader):
        self._loader = loader

    def __getitem__(self, start: tuple[int, int]) -> StepBatch:
        return self._loader.step_at(*start)


def _start_worker(_: int) -> None:
    """Set up a worker process: one thread, no signals, and an end together with the rank."""
    import signal

    die_with_parent()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def iterate_eval(
    rows: Rows,
    batch_size: int,
    rank: int,
    world_size: int,
    collator: Collator,
    max_rows: int | None,
) -> Iterator[Batch]:
    """Yield this rank's evaluation batches, the same number on every rank.

    The number must be the same, because ZeRO 3 gathers weights in each of them. The ranks of a
    sequence group have the same rows.
    """
    group, groups = rank // collator.part.count, world_size // collator.part.count
    count = min(len(rows), max_rows or len(rows))
    # By length, so that little is padded.
    order = np.argsort(rows.lengths[:count], kind="stable").tolist()
    rounds = -(-count // (batch_size * groups))
    for number in range(rounds):
        start = (number * groups + group) * batch_size
        chosen: list[int | None] = order[start : start + batch_size]
        yield collator.collate(rows, chosen or [None])

"""Rows per optimizer step as a pure function of how far the run is (``train.batch_schedule``)."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import pairwise

from llmtune.config.groups.train import BatchScheduleLr, BatchScheduleUnit, TrainConfig
from llmtune.plan.batch_sizes import BatchPlan


@dataclass(frozen=True, slots=True)
class Reached:
    """The progress of a run before a step."""

    steps: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens seen, padding excluded."""


BEGINNING = Reached()


@dataclass(frozen=True, slots=True)
class BatchSchedule:
    """Rows per step, over all ranks, of every step of a run."""

    entries: tuple[tuple[int, int], ...]
    """The beginning of each size, and its rows. The first begins at 0, and both grow."""
    unit: BatchScheduleUnit = BatchScheduleUnit.steps
    scaling: BatchScheduleLr = BatchScheduleLr.none

    @classmethod
    def from_config(cls, train: TrainConfig, global_batch_size: int) -> BatchSchedule:
        """Read the schedule; a run without one has the planned rows in every step."""
        if train.batch_schedule is None:
            return cls(((0, global_batch_size),))
        entries = tuple((start, rows) for start, rows in train.batch_schedule)
        return cls(entries, train.batch_schedule_unit, train.batch_schedule_lr)

    @property
    def grows(self) -> bool:
        """Tell whether there is more than one size."""
        return len(self.entries) > 1

    @property
    def counts_tokens(self) -> bool:
        """Tell whether a step's size depends on the tokens that were seen."""
        return self.unit is BatchScheduleUnit.tokens and self.grows

    @property
    def largest(self) -> int:
        """Return the rows of the largest step."""
        return self.entries[-1][1]

    def rows_at(self, reached: Reached) -> int:
        """Return the rows of the step that comes next."""
        starts = [start for start, _ in self.entries]
        done = reached.tokens if self.unit is BatchScheduleUnit.tokens else reached.steps
        return self.entries[bisect_right(starts, done) - 1][1]

    def rate_factor(self, rows: int) -> float:
        """Return what the peak learning rate is multiplied by in a step of so many rows."""
        ratio = rows / self.entries[0][1]
        if self.scaling is BatchScheduleLr.linear:
            return ratio
        return math.sqrt(ratio) if self.scaling is BatchScheduleLr.sqrt else 1.0

    def count_steps(self, rows: int) -> int:
        """Count the steps until ``rows`` rows are seen; the last step may have fewer.

        Where sizes begin at a number of tokens, the rows are needed for it: see
        :func:`llmtune.data.load.count_steps.count_in_steps`.
        """
        assert not self.counts_tokens
        for (start, size), (end, _) in pairwise(self.entries):
            if rows <= (end - start) * size:
                return start + math.ceil(rows / size)
            rows -= (end - start) * size
        start, size = self.entries[-1]
        return start + math.ceil(rows / size)

    def steps_by_rows(self, total_steps: int | None, row_tokens: int) -> list[tuple[int, int]]:
        """List the rows of each size with the number of its steps, for a prediction.

        Args:
            total_steps: Steps of the run; without it, the last size never ends and outweighs the
                others, so that it alone is returned.
            row_tokens: Tokens of a row.
        """
        if total_steps is None:
            return [(self.largest, 1)]
        found: list[tuple[int, int]] = []
        steps, tokens = 0, 0
        for index, (_, rows) in enumerate(self.entries):
            end = total_steps
            if index + 1 < len(self.entries):
                start = self.entries[index + 1][0]
                if self.counts_tokens:
                    start = steps + math.ceil(max(0, start - tokens) / (rows * row_tokens))
                end = min(total_steps, start)
            if end > steps:
                found.append((rows, end - steps))
                tokens += (end - steps) * rows * row_tokens
                steps = end
        return found

    def agrees_until(self, other: BatchSchedule, reached: Reached) -> bool:
        """Tell whether another schedule would have made the same steps so far."""
        past, others = self._past(reached), other._past(reached)
        alike = (self.unit, self.scaling) == (other.unit, other.scaling)
        return past == others and (alike or len(past) == 1)

    def describe(self) -> str:
        """Describe the rows per step in one phrase."""
        first, *rest = self.entries
        grown = "".join(f", {rows} after {self.describe_start(start)}" for start, rows in rest)
        return f"{first[1]} per step{grown}"

    def describe_start(self, start: int) -> str:
        """Describe where a size begins."""
        return f"{start:,} {self.unit.value}"

    def _past(self, reached: Reached) -> tuple[tuple[int, int], ...]:
        """Return the entries that some step so far may have followed."""
        starts = [start for start, _ in self.entries]
        done = reached.tokens if self.unit is BatchScheduleUnit.tokens else reached.steps
        return self.entries[: max(1, bisect_left(starts, done))]


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """The batch plan of the first step, and the schedule that its rows follow."""

    first: BatchPlan
    schedule: BatchSchedule

    @classmethod
    def from_config(cls, train: TrainConfig, batch: BatchPlan) -> ScheduledBatch:
        """Read the schedule that follows a plan's first step."""
        return cls(batch, BatchSchedule.from_config(train, batch.global_batch_size))

    @classmethod
    def of(cls, batch: BatchPlan | ScheduledBatch) -> ScheduledBatch:
        """Return the plan with its schedule; without one, it is the same in every step."""
        if isinstance(batch, ScheduledBatch):
            return batch
        return cls(batch, BatchSchedule(((0, batch.global_batch_size),)))

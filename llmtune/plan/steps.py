"""The length of a run in optimizer steps, and what comes every so many steps or every epoch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from llmtune.config.groups.train import EPOCH, STEPS, TrainConfig, strategy_name
from llmtune.units import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsPlan:
    """The run's length in optimizer steps."""

    total_steps: int
    warmup_steps: int
    total_rows: int | None
    """Rows after which the last step ends, for epochs; None where ``max_steps`` decides."""
    origin: str
    """Origin of the length, for the page before step 1."""
    epoch_rows: int | None = None
    """Rows of one epoch; None where they are streamed, and in records of earlier versions."""
    global_batch_size: int | None = None
    """Rows per step, of the first where they grow; None in records of earlier versions."""
    sizes: tuple[tuple[int, int], ...] | None = None
    """Steps before each size of a batch that grows, and its rows; None where it does not."""

    def rows_until(self, step: int) -> int:
        """Count the rows of all steps up to one, over epochs; 0 where they are not known."""
        rows = 0
        sizes = self.sizes or ((0, self.global_batch_size or 0),)
        for (start, size), (end, _) in pairwise((*sizes, (step, 0))):
            rows += max(0, min(end, step) - start) * size
        return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Steps between the first and the last after which evaluations or checkpoints come.

    What comes at the end of a run comes there once, and is not counted here.
    """

    strategy: str
    """``steps``, ``epoch`` or ``no``."""
    every: int | None
    """Steps between two, with ``steps``; None for none."""
    plan: StepsPlan

    def is_due(self, step: int) -> bool:
        """Tell whether one comes after ``step``.

        An epoch is finished by the step whose batch has its last row, though that batch may hold
        the first rows of the next epoch too.
        """
        return step < self.plan.total_steps and self._until(step) > self._until(step - 1)

    def count(self, after: int = 0) -> int:
        """Count those that come after a step."""
        last = self.plan.total_steps - 1
        return max(0, min(last - after, self._until(last) - self._until(after)))

    def describe(self) -> str:
        """Say how often they come, and how many there are."""
        if self.strategy == EPOCH:
            text = "every epoch"
        elif self.strategy == STEPS and self.every is not None:
            text = f"every {counted(self.every, 'step')}" if self.every > 1 else "every step"
        else:
            return "none before the end"
        return f"{text} ({self.count()} before the end)"

    def _until(self, step: int) -> int:
        """Count periods that are over after a step."""
        if self.strategy == EPOCH:
            rows = self.plan.epoch_rows
            return self.plan.rows_until(step) // rows if rows else 0
        if self.strategy == STEPS and self.every is not None:
            return step // self.every
        return 0


def evaluation_interval(train: TrainConfig, plan: StepsPlan) -> Interval:
    """Return when a run evaluates."""
    strategy = strategy_name(train.eval_strategy)
    return Interval(strategy=strategy, every=train.eval_steps, plan=plan)


def save_interval(train: TrainConfig, plan: StepsPlan) -> Interval:
    """Return when a run saves a checkpoint, apart from new best ones."""
    strategy = strategy_name(train.save_strategy)
    return Interval(strategy=strategy, every=train.save_steps, plan=plan)

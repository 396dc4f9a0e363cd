"""The number of optimizer steps, and what comes every so many steps or every epoch."""

import math
from dataclasses import dataclass

from llmtune.config.groups.schedule import ScheduleConfig
from llmtune.config.groups.train import EPOCH, STEPS, TrainConfig, strategy_name
from llmtune.errors import ConfigError
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
    """Rows per step; None in records of earlier versions."""


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
            rows, size = self.plan.epoch_rows, self.plan.global_batch_size
            return step * size // rows if rows and size else 0
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


def resolve_steps(
    train: TrainConfig, schedule: ScheduleConfig, rows: int | None, global_batch_size: int
) -> StepsPlan:
    """Take the steps from ``max_steps`` if it is set, else from epochs.

    A warm-up given as a ratio is rounded up to whole steps.

    Args:
        rows: Rows of an epoch; None where they are streamed, which requires ``max_steps``.
        global_batch_size: Rows per step, as planned.

    Raises:
        ConfigError: The warm-up leaves no step.
    """
    epoch_rows = max(1, round(train.num_train_epochs * (rows or 0)))
    by_epochs = math.ceil(epoch_rows / global_batch_size)
    origin = (
        f"{counted(train.num_train_epochs, 'epoch')} of {rows} rows, {global_batch_size} per step"
    )
    total = by_epochs
    if rows is None and train.max_steps is not None:
        total, origin = train.max_steps, "train.max_steps of a stream"
    elif train.max_steps is not None:
        # max_steps alone decides, as in the Hugging Face Trainer. It may also pass over the data
        # several times.
        total, origin = train.max_steps, f"train.max_steps ({origin} would be {by_epochs})"
    warmup = schedule.warmup_steps
    if warmup is None:
        warmup = math.ceil(schedule.warmup_ratio * total)
    if warmup >= total and warmup > 0 and total > 1:
        raise ConfigError(
            f"schedule.warmup_steps={warmup} leaves nothing of the {total} steps ({origin})"
        )
    return StepsPlan(
        total_steps=total,
        warmup_steps=min(warmup, total - 1),
        total_rows=None if train.max_steps else epoch_rows,
        origin=origin,
        epoch_rows=rows,
        global_batch_size=global_batch_size,
    )

"""The number of optimizer steps and of warm-up steps, from the config and the number of rows."""

import math
from dataclasses import dataclass

from llmtune.config.groups.schedule import ScheduleConfig
from llmtune.config.groups.train import TrainConfig
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
    """Where the length came from, for the page before step 1."""


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
    )

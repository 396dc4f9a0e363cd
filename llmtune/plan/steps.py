"""The number of optimizer steps and of warm-up steps, from the config and the number of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmtune.config.groups.schedule import ScheduleConfig
from llmtune.config.groups.train import TrainConfig
from llmtune.errors import ConfigError
from llmtune.plan.batch_schedule import BatchSchedule
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

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StepsPlan:
        """Build the plan from what JSON made of it."""
        return cls(**values)


def resolve_steps(
    train: TrainConfig,
    schedule: ScheduleConfig,
    rows: int | None,
    global_batch_size: int,
    count_steps: Callable[[int], int] | None = None,
) -> StepsPlan:
    """Take the steps from ``max_steps`` if it is set, else from epochs.

    A warm-up given as a ratio is rounded up to whole steps.

    Args:
        rows: Rows of an epoch; None where they are streamed, which requires ``max_steps``.
        global_batch_size: Rows per step, as planned; of the first step, where they grow.
        count_steps: Counts the steps until so many rows are seen; it is needed where the size of a
            step depends on the tokens of the rows before it.

    Raises:
        ConfigError: The warm-up leaves no step.
    """
    epoch_rows = max(1, round(train.num_train_epochs * (rows or 0)))
    batches = BatchSchedule.from_config(train, global_batch_size)
    origin = f"{counted(train.num_train_epochs, 'epoch')} of {rows} rows, {batches.describe()}"
    total = train.max_steps
    if total is None:
        total = (count_steps or batches.count_steps)(epoch_rows)
    elif rows is None:
        origin = "train.max_steps of a stream"
    elif batches.counts_tokens:
        # How many steps the epochs would be takes a pass over all rows.
        origin = "train.max_steps"
    else:
        # max_steps alone decides, as in the Hugging Face Trainer. It may also pass over the data
        # several times.
        origin = f"train.max_steps ({origin} would be {batches.count_steps(epoch_rows)})"
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

"""Resolve the number of optimizer steps and of warm-up steps, from the config and the rows."""

from __future__ import annotations

import math

from llmtune.config.groups.schedule import ScheduleConfig
from llmtune.config.groups.train import TrainConfig
from llmtune.errors import ConfigError
from llmtune.plan.length.batch_schedule import BatchSchedule
from llmtune.plan.steps import StepsPlan
from llmtune.units import counted


def rows_of_epochs(train: TrainConfig, rows: int) -> int:
    """Return the rows of all epochs of a run, of which each has ``rows``."""
    return max(1, round(train.num_train_epochs * rows))


def resolve_steps(
    train: TrainConfig,
    schedule: ScheduleConfig,
    rows: int | None,
    global_batch_size: int,
    in_steps: BatchSchedule | None = None,
) -> StepsPlan:
    """Take the steps from ``max_steps`` if it is set, else from epochs.

    A warm-up given as a ratio is rounded up to whole steps.

    Args:
        rows: Rows of an epoch; None where they are streamed, which requires ``max_steps``.
        global_batch_size: Rows per step, as planned; of the first step, where they grow.
        in_steps: ``train.batch_schedule`` with sizes that begin at steps; it is needed where the
            size of a step depends on the tokens of the rows before it. See
            :func:`llmtune.data.load.count_steps.count_in_steps`.

    Raises:
        ConfigError: The warm-up leaves no step.
    """
    epoch_rows = rows_of_epochs(train, rows or 0)
    batches = BatchSchedule.from_config(train, global_batch_size)
    origin = f"{counted(train.num_train_epochs, 'epoch')} of {rows} rows, {batches.describe()}"
    in_steps = in_steps or batches
    total = train.max_steps
    if total is None:
        total = in_steps.count_steps(epoch_rows)
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
        epoch_rows=rows,
        global_batch_size=global_batch_size,
        sizes=in_steps.entries if in_steps.grows and not in_steps.counts_tokens else None,
    )

"""The length of a run in optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llmtune.config.groups.schedule import ScheduleConfig
from llmtune.config.groups.train import TrainConfig
from llmtune.errors import ConfigError
from llmtune.units import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsPlan:
    """Length of the run, in optimizer steps."""

    total_steps: int
    warmup_steps: int
    total_rows: int | None
    """Rows of whole or broken epochs, after which the last step ends; None where ``max_steps``
    decides.
    """
    origin: str

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StepsPlan:
        """From plain values."""
        return cls(**values)


def resolve_steps(
    train: TrainConfig, schedule: ScheduleConfig, rows: int | None, global_batch_size: int
) -> StepsPlan:
    """Steps from ``max_steps`` if it is set, else from epochs; warm-up rounded up to whole steps.

    Args:
        rows: Of an epoch; None where they are streamed, which goes with ``max_steps``.
        global_batch_size: Rows of a step, as planned.

    Raises:
        ConfigError: Warm-up leaves no step.
    """
    epoch_rows = max(1, round(train.num_train_epochs * (rows or 0)))
    by_epochs = math.ceil(epoch_rows / global_batch_size)
    origin = (
        f"{counted(train.num_train_epochs, 'epoch')} of {rows} rows, {global_batch_size} a step"
    )
    total = by_epochs
    if rows is None and train.max_steps is not None:
        total, origin = train.max_steps, "train.max_steps of a stream"
    elif train.max_steps is not None:
        # max_steps alone decides, as in the Hugging Face Trainer: it may also go round the data
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

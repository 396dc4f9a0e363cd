"""The learning rate as a pure function of the step, so that a resume needs no state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from llmtune.registry import Registry


@dataclass(frozen=True, slots=True)
class Schedule:
    """One shape of the learning rate after warm-up."""

    name: str
    """Its value of ``schedule.lr_scheduler_type``."""
    decay: Callable[[float], float]
    """Maps the share of the steps after warm-up that are done, 0 to 1, to the share of the peak."""

    def __post_init__(self) -> None:
        for done in (0.0, 0.5, 1.0):
            share: object = self.decay(done)
            if not (isinstance(share, int | float) and math.isfinite(share) and share >= 0):
                raise ValueError(
                    f"decay({done}) of the schedule {self.name} must be a number from 0 on, not"
                    f" {share!r}"
                )


SCHEDULES: Registry[Schedule] = Registry(
    "schedule.lr_scheduler_type", "llmtune.train.schedules", interface=Schedule
)


def learning_rate_at(
    step: int, total_steps: int, warmup_steps: int, peak: float, kind: str
) -> float:
    """Return the learning rate of optimizer step ``step``, counted from 0.

    Warm-up rises linearly and reaches the peak at step ``warmup_steps``. The decay would reach its
    end at step ``total_steps``, one after the last. This follows transformers'
    ``get_*_schedule_with_warmup``, except for its first step, whose rate is 0 there.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * SCHEDULES.find(kind).decay(done)

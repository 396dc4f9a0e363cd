"""The learning rate as a pure function of the step, so that resuming needs no state."""

from __future__ import annotations

import math

from llmtune.config.schema import SchedulerType


def learning_rate_at(
    step: int, total_steps: int, warmup_steps: int, peak: float, kind: SchedulerType
) -> float:
    """The rate of optimizer step ``step``, counted from 0.

    Warm-up rises linearly and reaches the peak at step ``warmup_steps``; cosine and linear then
    fall towards 0, which they would reach at step ``total_steps``, one after the last. As
    transformers' ``get_*_schedule_with_warmup``, but without its first step at a rate of 0.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if kind is SchedulerType.constant:
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if kind is SchedulerType.linear:
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))

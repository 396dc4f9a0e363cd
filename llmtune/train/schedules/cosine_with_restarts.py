"""Several half cosines, each from the peak down to 0."""

from __future__ import annotations

import math

from llmtune.train.schedule import SCHEDULES, Point, Schedule


def _share(point: Point) -> float:
    """Follow transformers' ``get_cosine_with_hard_restarts_schedule_with_warmup``."""
    if point.done >= 1:
        return 0.0
    return 0.5 * (1 + math.cos(math.pi * ((point.settings.num_cycles * point.done) % 1.0)))


SCHEDULES.register(Schedule(name="cosine_with_restarts", share=_share, reads=("num_cycles",)))

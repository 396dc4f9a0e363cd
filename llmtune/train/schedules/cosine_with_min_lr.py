"""Half a cosine, from the peak down to a rate above 0."""

from __future__ import annotations

import math

from llmtune.errors import ConfigError
from llmtune.train.schedule import SCHEDULES, Point, Schedule, check_end


def _share(point: Point) -> float:
    """Follow transformers' ``get_cosine_with_min_lr_schedule_with_warmup``."""
    least = point.settings.min_lr_rate
    if point.settings.min_lr is not None:
        least = point.settings.min_lr / point.peak
    assert least is not None
    return 0.5 * (1 + math.cos(math.pi * point.done)) * (1 - least) + least


def _check(point: Point) -> None:
    rate, share = point.settings.min_lr, point.settings.min_lr_rate
    if (rate is None) == (share is None):
        shown = f"schedule.min_lr={rate} and schedule.min_lr_rate={share}"
        raise ConfigError(
            f"cosine_with_min_lr: {shown}; set one of them, and the other one to null"
        )
    check_end("min_lr", rate, point.peak)


SCHEDULES.register(
    Schedule(name="cosine_with_min_lr", share=_share, reads=("min_lr", "min_lr_rate"), check=_check)
)

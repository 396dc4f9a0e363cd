"""The peak rate for most of the run, and a fall in its last steps (WSD).

See https://arxiv.org/abs/2404.06395.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from llmtune.errors import ConfigError
from llmtune.train.schedule import SCHEDULES, Point, Schedule

#: Value of ``schedule.decay_type`` -> share of the way that is left, by the share that is done.
_FALLS: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "1-sqrt": lambda done: 1 - math.sqrt(done),
}


def _decay_steps(point: Point) -> int:
    if point.settings.num_decay_steps is not None:
        return point.settings.num_decay_steps
    return math.ceil(point.settings.decay_ratio * point.total_steps)


def _share(point: Point) -> float:
    """Follow transformers' ``get_wsd_schedule``."""
    least = point.settings.min_lr_rate or 0.0
    steps = _decay_steps(point)
    into_decay = point.step - (point.total_steps - steps)
    if into_decay < 0:
        return 1.0
    fall = _FALLS[point.settings.decay_type]
    return fall(min(1.0, into_decay / max(1, steps))) * (1 - least) + least


def _check(point: Point) -> None:
    if (shape := point.settings.decay_type) not in _FALLS:
        raise ConfigError(f"schedule.decay_type={shape}: one of {', '.join(_FALLS)}")
    steps = _decay_steps(point)
    if point.warmup_steps + steps > point.total_steps:
        raise ConfigError(
            f"warmup_stable_decay: {point.warmup_steps} steps of warm-up and {steps} of decay are"
            f" more than the {point.total_steps} of the run; take a smaller"
            " schedule.num_decay_steps, or schedule.decay_ratio"
        )


SCHEDULES.register(
    Schedule(
        name="warmup_stable_decay",
        share=_share,
        reads=("decay_type", "decay_ratio", "num_decay_steps", "min_lr_rate"),
        check=_check,
    )
)

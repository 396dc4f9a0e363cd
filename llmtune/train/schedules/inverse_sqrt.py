"""The inverse root of the step, whatever the length of the run."""

from __future__ import annotations

import math

from llmtune.train.schedule import SCHEDULES, Point, Schedule

#: The time scale of transformers where there is no warm-up.
_STEPS_WITHOUT_WARMUP = 10_000


def _share(point: Point) -> float:
    """Follow transformers' ``get_inverse_sqrt_schedule``."""
    scale = point.settings.timescale or point.warmup_steps or _STEPS_WITHOUT_WARMUP
    return 1.0 / math.sqrt((point.step - point.warmup_steps + scale) / scale)


SCHEDULES.register(Schedule(name="inverse_sqrt", share=_share, reads=("timescale",)))

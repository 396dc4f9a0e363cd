"""Half a cosine, from the peak down to 0."""

from __future__ import annotations

import math

from llmtune.train.schedule import SCHEDULES, Schedule


def _decay(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


SCHEDULES.register(Schedule("cosine", _decay))

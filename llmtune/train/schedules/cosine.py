"""Half a cosine, from the peak down to 0."""

from __future__ import annotations

import math

from llmtune.train.schedule import SCHEDULES, Point, Schedule


def _share(point: Point) -> float:
    return 0.5 * (1 + math.cos(math.pi * point.done))


SCHEDULES.register(Schedule(name="cosine", share=_share))

"""A straight line from the peak down to 0."""

from __future__ import annotations

from llmtune.train.schedule import SCHEDULES, Schedule

SCHEDULES.register(Schedule(name="linear", share=lambda point: 1 - point.done))

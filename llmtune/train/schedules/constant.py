"""The peak rate until the last step."""

from __future__ import annotations

from llmtune.train.schedule import SCHEDULES, Schedule

SCHEDULES.register(Schedule(name="constant", share=lambda _: 1.0))

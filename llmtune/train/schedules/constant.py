"""The peak rate until the last step."""

from __future__ import annotations

from llmtune.train.schedule import SCHEDULES, Schedule

SCHEDULES.register(Schedule("constant", lambda _: 1.0))

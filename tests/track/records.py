"""Records as a run logs them, and a run as a tracker is told about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmtune.config.groups.tracker import TrackerConfig
from llmtune.track.service import TrackedRun


def record(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 3.0 / max(step, 1),
        "tokens_per_second": 5.0,
        "memory_bytes": 10**9,
        **more,
    }


def tracked_run(folder: Path, said: list[str], **more: Any) -> TrackedRun:
    """A run in ``folder``; a field of its tracker's config is given as ``config=``."""
    values = {"config": TrackerConfig(), "name": "first", "settings": {"seed": 1}, **more}
    return TrackedRun(folder=folder, say=said.append, **values)

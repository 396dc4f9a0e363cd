"""What the program asks of an experiment tracker, and which trackers there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.config.schema import TrackerConfig
from llmtune.registry import NONE, Registry
from llmtune.track.tracker import Tracker


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """What a tracker is told about a run."""

    config: TrackerConfig
    folder: Path
    name: str
    settings: dict[str, Any]
    """The resolved configuration, as plain values; a tracker takes the secrets out of it."""
    say: Callable[[str], None]
    """Shows a line to the user."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """One kind of tracker."""

    name: str
    """As ``tracker=`` takes it."""
    title: str
    """What people call it."""
    open: Callable[[TrackedRun], Tracker]
    """Called once, in rank 0; where it raises, the run goes on without."""


SERVICES: Registry[Service] = Registry("tracker.kind", "llmtune.track.services", also=(NONE,))

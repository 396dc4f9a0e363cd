"""The registry of experiment trackers: each service says how a run is opened at it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.config.groups.tracker import TrackerConfig
from llmtune.registry import NONE, Registry
from llmtune.track.tracker import Tracker, check_tracker


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """A run, as a tracker is told about it."""

    config: TrackerConfig
    folder: Path
    name: str
    settings: dict[str, Any]
    """The resolved configuration as plain values; a tracker must redact secrets."""
    say: Callable[[str], None]
    """Shows a line to the user."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """A kind of experiment tracker."""

    name: str
    """The value of ``tracker=``."""
    title: str
    """Its name for people."""
    open: Callable[[TrackedRun], Tracker]
    """Called once, on rank 0; where it raises, the run continues without the tracker."""

    def __post_init__(self) -> None:
        if isinstance(self.open, type):
            check_tracker(self.open)


SERVICES: Registry[Service] = Registry(
    "tracker.kind", "llmtune.track.services", also=(NONE,), interface=Service
)


def open_service(run: TrackedRun) -> Tracker | None:
    """Open the chosen service; None if that fails, which must not stop the run."""
    service = SERVICES.find(run.config.kind)
    try:
        tracker = service.open(run)
        check_tracker(tracker)
    except Exception as error:
        run.say(
            f"{service.title} cannot be opened and is left out ({type(error).__name__}: {error})"
        )
        return None
    return tracker

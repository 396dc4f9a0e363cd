"""The registry of experiment trackers: each service says how a run is opened at it."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from llmtune.config.groups.tracker import TrackerConfig
from llmtune.errors import ConfigError, MissingPrerequisiteError
from llmtune.registry import NONE, Registry
from llmtune.security.redaction import redact, redact_values
from llmtune.storage import layout
from llmtune.storage.atomic import write_atomically
from llmtune.track.background import BackgroundTracker
from llmtune.track.tracker import Tracker, check_tracker
from llmtune.track.webhook import find_webhook_problem


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """A run, as a tracker is told about it: without the secrets of this environment."""

    config: TrackerConfig
    folder: Path
    name: str
    settings: dict[str, Any]
    """The resolved configuration as plain values."""
    say: Callable[[str], None]
    """Shows a line to the user; may be called from any thread."""
    plan: dict[str, Any] = field(default_factory=dict)
    """The plan as plain values: those of :meth:`llmtune.plan.plan.Plan.to_dict`."""
    first_step: int = 0
    """The step that this start resumes at; 0 for a new run."""
    write_report: Callable[[], None] = lambda: None
    """Writes the report of the run as it is now; takes seconds, and does not raise."""

    def __post_init__(self) -> None:
        """Redact every text, however the run is described."""
        entity = self.config.entity
        config = replace(
            self.config,
            project=redact(self.config.project),
            entity=redact(entity) if entity is not None else None,
        )
        clean = {
            "config": config,
            "name": redact(self.name),
            "settings": redact_values(self.settings),
            "plan": redact_values(self.plan),
        }
        for name, value in clean.items():
            object.__setattr__(self, name, value)

    @property
    def run_id(self) -> str:
        """Return the sweep agent's id, or one kept in the run folder, so that a run is resumed."""
        if agents_id := os.environ.get("WANDB_RUN_ID"):
            return agents_id
        path = self.folder / layout.TRACKER_RUN_ID
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, secrets.token_hex(4))
        return path.read_text().strip()


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """A kind of experiment tracker."""

    name: str
    """The value of ``tracker=``."""
    title: str
    """Its name for people."""
    open: Callable[[TrackedRun], Tracker]
    """Called once, on rank 0, in a thread of the tracker's own.

    Where it raises, the run continues without the tracker.
    """
    package: str | None = None
    """The module that it imports; None where it comes with llmtune's own requirements."""
    extra: str | None = None
    """The extra of llmtune that installs the module."""
    own_keys: tuple[str, ...] = ()
    """Keys of ``tracker`` that no other service reads."""
    find_problem: Callable[[TrackerConfig], str | None] = lambda _: None
    """Finds a broken rule of its own keys."""

    def __post_init__(self) -> None:
        if isinstance(self.open, type):
            check_tracker(self.open)

    def find_missing(self) -> str | None:
        """Return what ``pip install`` needs for a module that is not there, without importing."""
        if self.package is None or importlib.util.find_spec(self.package) is not None:
            return None
        return f"llmtune[{self.extra}]" if self.extra else self.package


SERVICES: Registry[Service] = Registry(
    "tracker.kind", "llmtune.track.services", also=(NONE,), interface=Service
)


def resolve_services(config: TrackerConfig) -> list[Service]:
    """Return the services of ``tracker.kind`` and ``tracker.kinds``, each once.

    Raises:
        ConfigError: One is not known.
    """
    named = config.kinds if config.kind == NONE else [config.kind, *config.kinds]
    return [SERVICES.find(name) for name in dict.fromkeys(named)]


def find_service_problems(config: TrackerConfig) -> Iterator[str]:
    """Find trackers that are not known, and keys that no chosen tracker reads."""
    if NONE in config.kinds:
        yield f"tracker.kinds={config.kinds}: {NONE} is no tracker; leave the list empty"
        return
    try:
        chosen = resolve_services(config)
    except ConfigError as error:
        yield str(error)
        return
    yield from (problem for service in chosen if (problem := service.find_problem(config)))
    if problem := find_webhook_problem(config.webhook):
        yield problem
    defaults = TrackerConfig()
    for service in SERVICES.list().values():
        for key in service.own_keys if service not in chosen else ():
            if (value := getattr(config, key)) != getattr(defaults, key):
                yield (
                    f"tracker.{key}={value} is only read by {service.title}: take"
                    f" tracker={service.name}, or add {service.name} to tracker.kinds"
                )


def check_packages(config: TrackerConfig) -> None:
    """Check that the packages of the chosen trackers are installed, without importing them.

    Raises:
        MissingPrerequisiteError: One is not.
    """
    for service in resolve_services(config):
        if wanted := service.find_missing():
            raise MissingPrerequisiteError(
                f"tracker={service.name}: {service.title} needs the package {service.package}: pip"
                f" install '{wanted}', or leave {service.name} out"
            )


def open_services(run: TrackedRun) -> list[BackgroundTracker]:
    """Begin to open the chosen services, each in a thread of its own."""
    return [
        BackgroundTracker(
            service.title,
            partial(service.open, run),
            run.say,
            # Others have no more time than before.
            stores_files=run.config.artifacts and "artifacts" in service.own_keys,
        )
        for service in resolve_services(run.config)
    ]

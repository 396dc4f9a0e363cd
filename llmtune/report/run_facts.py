"""Everything that a run folder says about its run, read without trust: no file has to be there."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmtune.errors import CheckpointError, LlmtuneError
from llmtune.metrics.confusion import ConfusionTable
from llmtune.plan.run_record import RunRecord
from llmtune.report.columns import Columns, read_columns
from llmtune.report.load_text import find_load_section
from llmtune.security.redaction import redact_values
from llmtune.security.trust import find_objection, open_foreign, read_foreign
from llmtune.storage import layout
from llmtune.storage.lock import find_holder
from llmtune.storage.plain_fields import from_plain
from llmtune.storage.plain_json import find_value, parse_json
from llmtune.storage.rank_files import EndRecord, FinishedRecord, RestartRecord
from llmtune.units import counted

#: Size limit of a metrics file, of which only numbers are kept: ten million steps.
_MOST_METRICS = 8 << 30
_CARD = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """The contents of a run folder, without secrets."""

    folder: Path
    record: RunRecord = field(default_factory=RunRecord)
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: Columns = field(default_factory=Columns)
    restarts: tuple[RestartRecord, ...] = ()
    finished: FinishedRecord | None = None
    end: EndRecord | None = None
    """The end of the last start; None while it runs, and where it was killed."""
    is_running: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by phase of a start that has ended by itself."""
    confusion: ConfusionTable | None = None
    samples: tuple[dict[str, Any], ...] = ()
    """Held-out prompts with the answers ``before`` and ``after``."""
    examples: dict[str, Any] = field(default_factory=dict)
    """Rows of the data with what is trained of them, and lengths (``data_examples.json``)."""
    checkpoints: tuple[int, ...] = ()
    """Steps of the complete checkpoints."""
    exports: dict[str, str] = field(default_factory=dict)
    """Name of an export's folder -> the Markdown of its card that says how to load it."""
    notes: tuple[str, ...] = ()
    """Sentences on what could not be read."""

    @property
    def name(self) -> str:
        """Return the run's name, or that of its folder."""
        return self.record.run_name or self.folder.resolve().name

    @property
    def state(self) -> str:
        """Return ``running``, ``finished``, ``stopped`` or ``failed``."""
        if self.is_running:
            return "running"
        if self.finished is not None:
            return "finished"
        return self.end.outcome if self.end is not None else "failed"

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value of the configuration by its dotted key."""
        return find_value(self.config, key, default)


def read_run(folder: Path, ended: bool = False) -> RunFacts:
    """Read a run folder; a file that is missing counts as empty, and a damaged one gets a note.

    Args:
        ended: The process that holds the folder's lock has ended its work.

    Raises:
        CheckpointError: It is no run folder: it has neither ``plan.json`` nor ``metrics.jsonl``.
    """
    if not any((folder / name).is_file() for name in (layout.PLAN, layout.METRICS)):
        raise CheckpointError(
            f"{folder}: no run folder (it has no {layout.PLAN} and no {layout.METRICS}); name a"
            " folder such as runs/NAME"
        )
    reader = _Reader(folder)
    metrics = reader.metrics()
    exports = sorted(
        entry for entry in folder.iterdir() if entry.is_dir() and layout.is_export_folder(entry)
    )
    texts = {
        entry.name: find_load_section(reader.text(f"{entry.name}/{_CARD}")) for entry in exports
    }
    finished = reader.object(layout.FINISHED)
    end = reader.object(layout.ENDED)
    return RunFacts(
        folder=folder,
        record=from_plain(RunRecord, reader.object(layout.PLAN)),
        config=reader.config(),
        environment=reader.object(layout.ENVIRONMENT),
        metrics=metrics,
        restarts=tuple(reader.restarts()),
        finished=from_plain(FinishedRecord, finished) if finished else None,
        end=from_plain(EndRecord, end) if end else None,
        is_running=not ended and find_holder(folder / layout.LOCK) is not None,
        seconds=_numbers(reader.object(layout.TIME).get("seconds")),
        confusion=reader.confusion(),
        samples=tuple(reader.objects(layout.SAMPLES)),
        examples=reader.object(layout.DATA_EXAMPLES),
        checkpoints=find_steps(folder),
        exports={name: text for name, text in texts.items() if text},
        notes=tuple(reader.notes),
    )


def find_steps(folder: Path) -> tuple[int, ...]:
    """Find the steps of a run's complete checkpoints, in order."""
    steps = ((layout.checkpoint_step(entry), entry) for entry in folder.iterdir() if entry.is_dir())
    return tuple(
        sorted(step for step, entry in steps if step and (entry / layout.COMPLETE).is_file())
    )


class _Reader:
    """Reads files of one folder, and notes what is damaged."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.notes: list[str] = []

    def text(self, name: str) -> str:
        """Read a file; empty where there is none, or none that may be read."""
        file = self._folder / name
        if not file.exists():
            return ""
        try:
            return read_foreign(file, CheckpointError)
        except (LlmtuneError, UnicodeDecodeError, OSError) as error:
            self.notes.append(f"{name} is left out: {error}")
            return ""

    def json(self, name: str) -> Any:
        """Read a file of JSON without its secrets; None where it cannot be read."""
        text = self.text(name)
        if not text:
            return None
        try:
            return redact_values(_finite(parse_json(text)))
        except ValueError as error:
            self.notes.append(f"{name} is left out, because it is damaged: {error}")
            return None

    def object(self, name: str) -> dict[str, Any]:
        """Read a file with one object; empty for anything else."""
        found = self.json(name)
        return found if isinstance(found, dict) else {}

    def objects(self, name: str) -> list[dict[str, Any]]:
        """Read a file with a list of objects."""
        found = self.json(name)
        return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []

    def config(self) -> dict[str, Any]:
        """Read the configuration as plain values; one of another version is read too."""
        try:
            found = yaml.safe_load(self.text(layout.CONFIG))
        except (yaml.YAMLError, RecursionError) as error:
            self.notes.append(f"{layout.CONFIG} is left out, because it is damaged: {error}")
            return {}
        return redact_values(found) if isinstance(found, dict) else {}

    def confusion(self) -> ConfusionTable | None:
        """Read which classes were taken for which."""
        found = self.object(layout.CONFUSION_TABLE)
        if not found:
            return None
        try:
            return ConfusionTable.from_json(json.dumps(found))
        except ValueError as error:
            self.notes.append(f"{layout.CONFUSION_TABLE} is left out: {error}")
            return None

    def metrics(self) -> Columns:
        """Read the numbers of all records."""
        file = self._folder / layout.METRICS
        if not file.exists():
            return Columns()
        if (reason := find_objection(file, _MOST_METRICS)) is not None:
            self.notes.append(f"{layout.METRICS} {reason}")
            return Columns()
        with open_foreign(file, CheckpointError, _MOST_METRICS) as lines:
            columns = read_columns(lines)
        if columns.damaged:
            self.notes.append(
                f"{layout.METRICS}: {counted(columns.damaged, 'damaged line')} left out"
            )
        return columns

    def restarts(self) -> list[RestartRecord]:
        """Read the restarts, oldest first."""
        records, damaged = [], 0
        for line in self.text(layout.RESTARTS).splitlines():
            try:
                records.append(from_plain(RestartRecord, redact_values(_finite(parse_json(line)))))
            except ValueError:
                damaged += 1
        if damaged:
            self.notes.append(f"{layout.RESTARTS}: {counted(damaged, 'damaged line')} left out")
        return records


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite, which JSON does not have and Python reads, by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(values: Any) -> dict[str, float]:
    found = values if isinstance(values, dict) else {}
    return {
        str(key): float(value)
        for key, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }

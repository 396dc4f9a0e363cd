"""List run folders: their state, step, losses, size and age, without reading all of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtune.errors import ConfigError, LlmtuneError
from llmtune.plan.run_record import RunRecord
from llmtune.security.trust import open_foreign, read_foreign
from llmtune.storage import layout
from llmtune.storage.atomic import read_json
from llmtune.storage.lock import find_holder
from llmtune.storage.plain_fields import from_plain
from llmtune.storage.plain_json import parse_json, parse_lines
from llmtune.storage.rank_files import EndRecord, FinishedRecord

#: Bytes at the end of a metrics file, with the newest losses.
_TAIL_BYTES = 1 << 18
_MOST_METRICS = 8 << 30
#: Levels of folders in which runs are looked for, such as runs/SWEEP/TRIAL.
_MOST_LEVELS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEntry:
    """One run folder."""

    folder: Path
    name: str
    state: str
    """``running``, ``finished``, ``stopped`` or ``failed``."""
    step: int
    total_steps: int | None
    loss: float | None
    eval_loss: float | None
    size_bytes: int
    """Bytes on the disk; a file with two names counts once."""
    age_seconds: float
    """Seconds since the run last wrote a record."""
    message: str
    """The reason for an end before the last step."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "folder": str(self.folder)}


def is_run_folder(folder: Path) -> bool:
    """Tell whether a folder holds a run that has begun."""
    return all((folder / name).is_file() for name in (layout.CONFIG, layout.PLAN))


def find_runs(folder: Path) -> list[Path]:
    """Find the run folders in a folder, or the folder itself if it is one, sorted by name.

    Raises:
        ConfigError: There is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"runs: {folder} is no folder; name the one that holds run folders")
    return sorted(_walk(folder, _MOST_LEVELS))


def _walk(folder: Path, levels: int) -> Iterator[Path]:
    if is_run_folder(folder):
        yield folder
    elif levels:
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                yield from _walk(folder / entry.name, levels - 1)


def list_runs(folder: Path) -> list[RunEntry]:
    """Read the runs in a folder, the newest last.

    Raises:
        ConfigError: There is no such folder.
    """
    return sorted((_read_entry(run) for run in find_runs(folder)), key=lambda e: -e.age_seconds)


def _read_entry(run: Path) -> RunEntry:
    record = _read_record(run)
    lines = _read_tail(run / layout.METRICS)
    finished = FinishedRecord.read(run)
    ended = read_json(run / layout.ENDED)
    end = from_plain(EndRecord, ended) if isinstance(ended, dict) else None
    step = next((line["step"] for line in reversed(lines) if type(line.get("step")) is int), 0)
    return RunEntry(
        folder=run,
        name=record.run_name or run.resolve().name,
        state=_find_state(run, finished, end),
        step=step or (finished.step if finished is not None else 0),
        total_steps=record.steps.total_steps if record.steps is not None else None,
        loss=_newest(lines, "loss"),
        eval_loss=_newest(lines, "eval_loss"),
        size_bytes=measure(run),
        age_seconds=max(0.0, time.time() - _changed_at(run)),
        message=end.message if end is not None else "",
    )


def _find_state(run: Path, finished: FinishedRecord | None, end: EndRecord | None) -> str:
    if find_holder(run / layout.LOCK) is not None:
        return "running"
    if finished is not None:
        return "finished"
    return end.outcome if end is not None else "failed"


def _read_record(run: Path) -> RunRecord:
    try:
        return from_plain(RunRecord, parse_json(read_foreign(run / layout.PLAN, ConfigError)))
    except (LlmtuneError, ValueError):
        return RunRecord()


def _read_tail(file: Path) -> list[dict[str, Any]]:
    """Read the newest records of a metrics file; none where it cannot be read."""
    try:
        with open_foreign(file, ConfigError, _MOST_METRICS) as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL_BYTES))
            return list(parse_lines(stream.read().decode(errors="replace")))
    except (LlmtuneError, OSError):
        return []


def _newest(lines: list[dict[str, Any]], key: str) -> float | None:
    for line in reversed(lines):
        value = line.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


def _changed_at(run: Path) -> float:
    times = [
        (run / name).stat().st_mtime
        for name in (layout.METRICS, layout.PLAN, layout.FINISHED)
        if (run / name).exists()
    ]
    return max(times, default=0.0)


def measure(folder: Path) -> int:
    """Return the bytes of a folder on the disk; links are not followed."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(parent, name))  # noqa: PTH118 - many files
            except OSError:
                continue
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                total += 512 * status.st_blocks
    return total

"""One JSON file and one table of what the checks found."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtune.storage.atomic import write_atomically
from scripts.gpu_check.machine import Machine

_STYLES = {"passed": "green", "failed": "bold red", "skipped": "yellow"}
#: Of a table that goes to a file.
_FILE_WIDTH = 140


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One check."""

    name: str
    passed: bool | None
    """None where it was skipped."""
    seconds: float
    measured: Any = None
    expected: Any = None
    tolerance: Any = None
    skipped: str | None = None
    """Why it could not run here."""
    problems: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        """In one word."""
        return "skipped" if self.passed is None else "passed" if self.passed else "failed"

    @property
    def note(self) -> str:
        """Why it did not pass, or what it measured."""
        return self.skipped or "; ".join(self.problems) or summarize(self.measured)


def write_json(path: Path, machine: Machine, results: Sequence[Result]) -> None:
    """The whole report."""
    report = {
        "card": machine.card,
        "driver": machine.driver,
        "versions": machine.versions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "checks": [asdict(result) for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_without_nan(report), indent=1, allow_nan=False)
    write_atomically(path, text + "\n")


def print_table(console: Console, machine: Machine, results: Sequence[Result]) -> None:
    """One row a check; colored on a terminal."""
    table = Table(title=machine.card, title_justify="left")
    for heading in ("check", "", "seconds", "measured, or what is wrong"):
        table.add_column(
            heading, justify="right" if heading == "seconds" else "left", overflow="fold"
        )
    for result in results:
        style = _STYLES[result.state]
        seconds = f"{result.seconds:.1f}"
        table.add_row(
            Text(result.name),
            Text(result.state, style),
            seconds,
            Text(result.note, style if not result.passed else ""),
        )
    console.print(table)


def make_console() -> Console:
    """Of standard output, wide enough for the table where that is a file."""
    return Console() if sys.stdout.isatty() else Console(width=_FILE_WIDTH)


def summarize(measured: Any) -> str:
    """The numbers of a check that passed, in one line."""
    if not isinstance(measured, dict):
        return "" if measured is None else str(measured)
    parts = []
    for name, value in measured.items():
        if name == "losses":
            parts.append(f"loss {value[0]:.4f} -> {value[-1]:.4f}")
        elif name.endswith("_bytes"):
            parts.append(f"{name.removesuffix('_bytes').replace('_', ' ')} {value / 1e6:,.0f} MB")
        elif isinstance(value, float):
            parts.append(f"{name.replace('_', ' ')} {value:.4g}")
        elif isinstance(value, list):
            parts.append(f"{name.replace('_', ' ')} {', '.join(map(str, value))}")
        elif value is not None:
            parts.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(parts)


def _without_nan(value: Any) -> Any:
    """Return null where a number is not finite, which JSON has not."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return value

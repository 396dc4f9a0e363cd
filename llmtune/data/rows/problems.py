"""Problems of the data, found row by row and named by ``file:line``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class RowError(Exception):
    """A row cannot be used; the caller adds file and line."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem of the data, and its location."""

    file: str
    line: int | None
    """Line of a text file, or row of Parquet and Arrow, counted from 1; None for the whole file."""
    message: str

    def __str__(self) -> str:
        return f"{format_location(self.file, self.line)}: {self.message}"

    @property
    def kind(self) -> str:
        """Return the message without what differs from row to row; problems are counted by it."""
        return re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\(.*?\)|\d+", "_", self.message)


def format_location(file: str, line: int | None) -> str:
    """Write ``file:line``."""
    return file if line is None else f"{file}:{line}"


def short(value: Any) -> str:
    """Shorten a value for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_problem_file(path: Path) -> Iterator[Problem]:
    """Yield the problems that were written to a file; there may be millions."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield Problem(**json.loads(line))

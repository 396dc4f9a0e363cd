"""Problems of the data: found per row, named by ``file:line``, counted, reported together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from llmtune.errors import DataError
from llmtune.security.redaction import redact_values

#: Kinds of problem that an error message lists; the rest is counted.
LISTED_KINDS = 8


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


def write_problems(problems: Iterable[Problem], file: TextIO) -> None:
    """Append a line of JSON per problem."""
    file.writelines(
        json.dumps(redact_values(asdict(problem)), ensure_ascii=False) + "\n"
        for problem in problems
    )


def read_problem_file(path: Path) -> Iterator[Problem]:
    """Yield the problems that were written to a file; there may be millions."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield Problem(**json.loads(line))


def group_by_kind(problems: Iterable[Problem]) -> list[tuple[Problem, int]]:
    """Return the first problem of each kind, in order, and the number of problems of that kind.

    The problems are read once.
    """
    first: dict[str, Problem] = {}
    counts: dict[str, int] = {}
    for problem in problems:
        kind = problem.kind
        first.setdefault(kind, problem)
        counts[kind] = counts.get(kind, 0) + 1
    return [(problem, counts[kind]) for kind, problem in first.items()]


def describe(problems: Iterable[Problem]) -> Iterator[str]:
    """Write a line per kind: the first location, and the count."""
    kinds = group_by_kind(problems)
    for problem, count in kinds[:LISTED_KINDS]:
        yield str(problem) + (f" ({count:,} like it)" if count > 1 else "")
    if len(kinds) > LISTED_KINDS:
        yield f"and {len(kinds) - LISTED_KINDS} other kinds of problem"


def refuse(problems: Iterable[Problem], advice: str) -> DataError:
    """Return the error about rows that cannot be trained on."""
    lines = list(describe(problems))
    if len(lines) == 1:
        return DataError(f"{lines[0]}\n{advice}")
    return DataError(
        "problems in the data:\n" + "\n".join(f"  {line}" for line in lines) + f"\n{advice}"
    )

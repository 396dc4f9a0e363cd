"""Write, count and report problems of the data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TextIO

from llmtune.data.rows.problems import Problem
from llmtune.errors import DataError
from llmtune.security.redaction import redact_values

#: Kinds of problem that an error message lists; the rest is counted.
LISTED_KINDS = 8


def write_problems(problems: Iterable[Problem], file: TextIO) -> None:
    """Append a line of JSON per problem."""
    file.writelines(
        json.dumps(redact_values(asdict(problem)), ensure_ascii=False) + "\n"
        for problem in problems
    )


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

"""The numbers of ``metrics.jsonl`` as columns, whose size does not depend on the lines' keys."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from llmtune.storage.plain_json import parse_json

#: Keys of a file that anybody may have written; the next ones are left out.
MOST_KEYS = 256

Point = tuple[float, float]
"""A step, and a value."""


@dataclass(frozen=True, slots=True)
class Column:
    """The finite values of a key, in the order of their steps."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def __len__(self) -> int:
        return len(self.steps)

    def points(self) -> Iterator[Point]:
        """Yield step and value."""
        return zip(self.steps, self.values, strict=True)


@dataclass(slots=True)
class Columns:
    """The numbers of a metrics file by key."""

    by_key: dict[str, Column] = field(default_factory=dict)
    damaged: int = 0
    """Lines that are no records, such as the half-written one that a crash leaves."""
    last_step: int | None = None

    def get(self, key: str) -> Column:
        """Return the values of a key; none where no record has it."""
        return self.by_key.get(key, Column())

    def last(self, key: str) -> float | None:
        """Return the newest value of a key."""
        column = self.get(key)
        return column.values[-1] if len(column) else None

    def evaluation_keys(self) -> list[str]:
        """List the keys of held-out metrics, the loss first."""
        found = sorted(
            key for key in self.by_key if key.startswith("eval_") and not key.endswith("_seconds")
        )
        return sorted(found, key=lambda key: key != "eval_loss")


def read_columns(lines: Iterable[bytes]) -> Columns:
    """Read the lines of a metrics file; what is no record is counted and passed over."""
    columns = Columns()
    for line in lines:
        if not line.strip():
            continue
        try:
            record = parse_json(line)
            step = record["step"]
        except (ValueError, TypeError, KeyError):
            columns.damaged += 1
            continue
        if not isinstance(record, dict) or not _is_number(step):
            columns.damaged += 1
            continue
        columns.last_step = int(step)
        for key, value in record.items():
            if key == "step" or not _is_number(value):
                continue
            if key not in columns.by_key and len(columns.by_key) >= MOST_KEYS:
                continue
            column = columns.by_key.setdefault(key, Column())
            column.steps.append(step)
            column.values.append(value)
    return columns


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def thin(points: list[Point], most: int) -> list[Point]:
    """Leave out points of a long curve, and keep its ends and the extremes of each stretch.

    Args:
        most: Points that are left at most; four or more.
    """
    if len(points) <= most:
        return points
    stretches = most // 4
    kept: set[int] = set()
    for number in range(stretches):
        begin = number * len(points) // stretches
        end = (number + 1) * len(points) // stretches
        inside = range(begin, end)
        kept |= {
            begin,
            end - 1,
            min(inside, key=lambda index: points[index][1]),
            max(inside, key=lambda index: points[index][1]),
        }
    return [points[index] for index in sorted(kept)]


def smooth(points: list[Point], share: float = 0.02) -> list[Point]:
    """Average a curve over its newest values, each weighing less than the next.

    The average is exponential, with the weights of what is before the first value left out (Kingma
    and Ba, 2015, section 3).

    Args:
        share: The share of all points over which it averages, about.
    """
    decay = 1 - 1 / max(1.0, share * len(points))
    mean, weight, smoothed = 0.0, 0.0, []
    for step, value in points:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append((step, mean / weight))
    return smoothed

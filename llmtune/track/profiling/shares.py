"""Share the time of some windows out among what went on in them, so that the parts add up."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """Something that went on from one moment to another, both in the same unit."""

    start: float
    end: float
    level: int
    """The rank among activities at the same time, of which the highest counts."""
    category: str
    name: str


def share_out(
    activities: Iterable[Activity], windows: Sequence[tuple[float, float]]
) -> dict[tuple[str, str], float]:
    """Give every moment of the windows to one activity.

    Of those under way it is the one of the highest level, and among these the one that began last:
    the innermost of nested calls. Moments without any are given to nobody.

    Args:
        windows: Pairs of a start and an end, which do not overlap.

    Returns:
        The time of each category and name.
    """
    clipped = sorted(
        (
            (max(one.start, start), min(one.end, end), one)
            for one in activities
            for start, end in windows
            if one.start < end and one.end > start
        ),
        key=lambda entry: entry[0],
    )
    moments = sorted({moment for start, end, _ in clipped for moment in (start, end)})
    found: dict[tuple[str, str], float] = {}
    # Those under way, the one that counts on top; the number keeps equal ones apart.
    under_way: list[tuple[int, float, int, float, Activity]] = []
    place = 0
    for moment, following in itertools.pairwise(moments):
        while place < len(clipped) and clipped[place][0] <= moment:
            _, end, one = clipped[place]
            heapq.heappush(under_way, (-one.level, -one.start, -place, end, one))
            place += 1
        while under_way and under_way[0][3] <= moment:
            heapq.heappop(under_way)
        if under_way:
            one = under_way[0][4]
            key = (one.category, one.name)
            found[key] = found.get(key, 0.0) + following - moment
    return found

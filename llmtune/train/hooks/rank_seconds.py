"""Find the rank that all others wait for, from the seconds that each measures anyway."""

from __future__ import annotations

import statistics

from llmtune.engine.distributed import Rank, gather_objects
from llmtune.track.tracker import Record

#: Steps between two comparisons, and the first steps of a start, which are not compared.
EVERY_STEPS, WARM_UP_STEPS = 20, 3


class RankSeconds:
    """Compares the ranks' own seconds now and then, without waiting for a GPU.

    All ranks take the same time for a step, because those that are done wait in its collectives. A
    rank's own seconds are those before it waits for any: of its rows and its forward pass, but for
    the weights that ZeRO 3 gathers in it. What slows a rank down slows these down too.
    """

    def __init__(self, rank: Rank):
        self._rank = rank
        self._steps = 0
        self._before = 0.0
        self._found: Record = {}

    def after_step(self) -> None:
        """Count a step, and compare the ranks when it is time. Collective then."""
        self._steps += 1
        if self._rank.world_size == 1:
            return
        if self._steps == WARM_UP_STEPS:
            self._before = self._own_seconds()
        elif self._steps > WARM_UP_STEPS and (self._steps - WARM_UP_STEPS) % EVERY_STEPS == 0:
            now = self._own_seconds()
            per_step = (now - self._before) / EVERY_STEPS
            self._before = now
            self._found = compare(gather_objects(per_step, self._rank))

    def take(self) -> Record:
        """Return what the newest comparison found, once."""
        found, self._found = self._found, {}
        return found

    def _own_seconds(self) -> float:
        totals = self._rank.phases.clock.totals
        own = totals.get("data", 0.0) + totals.get("forward", 0.0)
        return own - totals.get("gather in forward", 0.0)


def compare(seconds: list[float]) -> Record:
    """Return the slowest rank, its seconds, and the median of the others; of two ranks or more."""
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = [value for rank, value in enumerate(seconds) if rank != slowest]
    return {
        "slowest_rank": slowest,
        "slowest_rank_seconds": seconds[slowest],
        "other_ranks_seconds": statistics.median(others),
    }

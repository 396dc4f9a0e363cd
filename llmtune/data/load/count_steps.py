"""Count the steps of a run whose batch grows with the tokens that were seen."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile

from llmtune.data.load.collate import Collator
from llmtune.data.load.loader import TrainLoader
from llmtune.data.store.token_store import Rows
from llmtune.plan.batch_schedule import ScheduledBatch


def step_counter(rows: Rows, batch: ScheduledBatch, seed: int) -> Callable[[int], int]:
    """Make a function that counts the steps until so many rows are seen.

    The order of rows is a function of the seed, and their lengths are known, so that the count is
    exact. It takes a pass over the lengths.
    """

    def count(total_rows: int) -> int:
        # Only first rows and sizes are asked for, so that nothing is collated.
        loader = TrainLoader(
            rows=rows,
            batch=batch,
            rank=0,
            seed=seed,
            collator=Collator(pad_token_id=0),
            last_row=total_rows,
        )
        return sum(1 for _ in takewhile(lambda start: start[0] < total_rows, loader.step_starts()))

    return count

"""Count the steps of a run whose batch grows with the tokens that were seen."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

from llmtune.config.groups.train import BatchScheduleUnit, TrainConfig
from llmtune.data.load.collate import Collator
from llmtune.data.load.loader import TrainLoader
from llmtune.data.store.token_store import Rows
from llmtune.plan.length.batch_schedule import BatchSchedule, ScheduledBatch
from llmtune.plan.length.resolve_steps import rows_of_epochs


def count_in_steps(
    rows: Rows, batch: ScheduledBatch, train: TrainConfig, seed: int
) -> BatchSchedule:
    """Count the steps before each size of a schedule, and return the schedule with these.

    The order of rows is a function of the seed, and their lengths are known, so that the count is
    exact. It takes a pass over the lengths until the last size begins. Sizes that the run does not
    reach are left out.
    """
    # Only first rows and sizes are asked for, so that nothing is collated.
    loader = TrainLoader(
        rows=rows, batch=batch, rank=0, seed=seed, collator=Collator(pad_token_id=0)
    )
    last_row = None if train.max_steps is not None else rows_of_epochs(train, len(rows))
    entries: list[tuple[int, int]] = []
    for step, (first_row, size) in enumerate(islice(loader.step_starts(), train.max_steps)):
        if last_row is not None and first_row >= last_row:
            break
        if not entries or size != entries[-1][1]:
            entries.append((step, size))
        if size == batch.schedule.largest:
            break
    return replace(batch.schedule, entries=tuple(entries), unit=BatchScheduleUnit.steps)

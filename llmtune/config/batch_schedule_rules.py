"""Rules over ``train.batch_schedule``: pairs that begin at 0, come later and grow."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from llmtune.config.groups.train import TrainConfig

_EXAMPLE = "[[0,8],[500,16]]"


def find_batch_schedule_problems(train: TrainConfig) -> Iterator[str]:
    """Yield what is wrong with the schedule, in words a user can act on.

    A schedule grows, as in Megatron-LM's ``--rampup-batch-size``; a size that shrinks or repeats
    is taken for a mistake.
    """
    schedule = train.batch_schedule
    if schedule is None:
        return
    shown = f"train.batch_schedule={schedule}"
    if not schedule or any(len(entry) != 2 for entry in schedule):
        yield f"{shown}: a list of pairs, where a size begins and the size, as in {_EXAMPLE}"
        return
    if schedule[0][0] != 0:
        yield f"{shown}: the first size must begin at 0, not at {schedule[0][0]}"
    for start, rows in schedule:
        if rows <= 0:
            yield f"{shown}: {rows} rows from {start} on: a size must be above 0"
    unit = train.batch_schedule_unit.value
    for (before, fewer), (start, rows) in pairwise(schedule):
        if start <= before:
            yield f"{shown}: {rows} rows begin at {start} {unit}, which must be above {before}"
        if 0 < rows <= fewer:
            yield (
                f"{shown}: {rows} rows from {start} {unit} on are no more than the {fewer} before:"
                " sizes must grow"
            )
    first, fixed = schedule[0][1], train.global_batch_size
    if fixed not in ("auto", first):
        yield (
            f"train.global_batch_size={fixed} contradicts train.batch_schedule, which begins with"
            f" {first} rows: leave train.global_batch_size out"
        )

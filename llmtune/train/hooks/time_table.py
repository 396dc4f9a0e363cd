"""Show where the time went, and how the run compares with its plan, at the end of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.engine.distributed import Rank
from llmtune.storage import layout
from llmtune.storage.atomic import write_atomically
from llmtune.track.console import Console
from llmtune.track.metrics import read_metrics
from llmtune.track.phase_seconds import (
    compare_memory,
    compare_speed,
    describe_comparisons,
    describe_seconds,
)
from llmtune.train.training_state import TrainingState

if TYPE_CHECKING:
    from llmtune.plan.plan import Plan


class TimeTable:
    """Prints the table on rank 0, and writes ``time.json``.

    The seconds are those of this start on rank 0.
    """

    def __init__(self, run: Path, rank: Rank, plan: Plan, console: Console):
        self.run = run
        self.rank = rank
        self.plan = plan
        self.console = console

    def on_start(self, progress: TrainingState) -> None:
        """Do nothing: no time has passed yet."""

    def on_end(self, progress: TrainingState) -> None:  # noqa: ARG002 - as all hooks
        """Print and write what has been measured."""
        if not self.rank.is_first:
            return
        clock = self.rank.phases.clock
        clock.read()
        records = read_metrics(self.run / layout.METRICS)
        speed, memory = compare_speed(self.plan, records), compare_memory(self.plan, records)
        compared = describe_comparisons(speed, memory)
        self.console.page("where the time went", {**describe_seconds(clock.totals), **compared})
        values = {
            "seconds": dict(clock.totals),
            "tokens_per_second": speed and speed.to_dict(),
            "memory_bytes": memory and memory.to_dict(),
        }
        write_atomically(self.run / layout.TIME, json.dumps(values, indent=1))

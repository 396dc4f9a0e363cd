"""Evaluation of the held-out rows during training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.data.load.batch import Batch
from llmtune.data.load.collate import Collator
from llmtune.data.load.loader import iterate_eval
from llmtune.data.store.token_store import Rows
from llmtune.engine.distributed import gather_rows
from llmtune.engine.train_module import TrainModule
from llmtune.metrics.report import write_table
from llmtune.task.labels import Labels
from llmtune.task.task import Task
from llmtune.track.tracker import Record
from llmtune.train.training_state import TrainingState

if TYPE_CHECKING:
    from llmtune.metrics.confusion import ConfusionTable


@dataclass(slots=True, kw_only=True)
class Evaluator:
    """Takes the loss and the metrics of the held-out rows; each rank computes its share."""

    module: TrainModule
    rows: Rows | None
    batch_size: int
    collator: Collator
    max_rows: int | None
    """Rows per evaluation; None for all."""
    task: Task
    labels: Labels
    run: Path
    table: ConfusionTable | None = None
    """Table of the newest evaluation; None for a task without classes."""

    def evaluate(self, progress: TrainingState, interrupted: Callable[[], bool]) -> Record | None:
        """Return an evaluation record; None if there are no eval rows, or if it was interrupted."""
        if self.rows is None:
            return None
        rank = self.module.rank
        batches = iterate_eval(
            self.rows, self.batch_size, rank.rank, rank.world_size, self.collator, self.max_rows
        )
        result = self.module.evaluate(self._told(batches), interrupted)
        if result is None:
            return None
        observed = {name: gather_rows(rows, rank) for name, rows in result.observed.items()}
        self.table = self.task.count(observed, self.labels)
        metrics = self.task.metrics(result.loss, observed, self.labels)
        return {"step": progress.step, "eval_loss": result.loss, **metrics}

    def _told(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches, and tell people how far the evaluation is."""
        rank = self.module.rank
        assert self.rows is not None
        rows = min(len(self.rows), self.max_rows or len(self.rows))
        groups = rank.world_size // self.collator.part.count
        count = -(-rows // (self.batch_size * groups))
        for number, batch in enumerate(batches, start=1):
            rank.phases.tell(f"batch {number} of {count}")
            yield batch

    def write_table(self) -> None:
        """Write which classes were taken for which by the newest evaluation."""
        if self.table is not None and self.module.rank.is_first:
            write_table(self.table, self.run)

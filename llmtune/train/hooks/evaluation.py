"""Held-out loss during training."""

from __future__ import annotations

import math
from collections.abc import Callable

from llmtune.data.load.collate import Collator
from llmtune.data.load.loader import iterate_eval
from llmtune.data.store.token_store import Rows
from llmtune.engine.train_module import TrainModule
from llmtune.track.tracker import Record
from llmtune.train.training_state import TrainingState


class HeldOutLoss:
    """The mean loss over the trained tokens of the eval rows; each rank computes its share."""

    def __init__(
        self,
        module: TrainModule,
        rows: Rows | None,
        batch_size: int,
        collator: Collator,
        max_rows: int | None,
    ):
        self.module = module
        self.rows = rows
        self.batch_size = batch_size
        self.collator = collator
        self.max_rows = max_rows

    def evaluate(self, progress: TrainingState, interrupted: Callable[[], bool]) -> Record | None:
        """Return an evaluation record; None if there are no eval rows, or if it was interrupted."""
        if self.rows is None:
            return None
        rank = self.module.rank
        batches = iterate_eval(
            self.rows, self.batch_size, rank.rank, rank.world_size, self.collator, self.max_rows
        )
        result = self.module.evaluate(batches, interrupted)
        if result is None:
            return None
        loss, _ = result
        return {"step": progress.step, "eval_loss": loss, "eval_perplexity": perplexity(loss)}


def perplexity(loss: float) -> float:
    """Return ``exp(loss)``, or infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf

"""Held-out loss during training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from llmtune.data.loader import iterate_eval
from llmtune.engine.module import TrainModule
from llmtune.track.tracker import Record
from llmtune.train.loop import Progress

if TYPE_CHECKING:
    from datasets import Dataset


class HeldOutLoss:
    """Mean loss over the trained tokens of the evaluation rows, all ranks taking their share."""

    def __init__(
        self, module: TrainModule, rows: Dataset | None, batch_size: int, pad_token_id: int, max_rows: int | None
    ):
        self.module = module
        self.rows = rows
        self.batch_size = batch_size
        self.pad_token_id = pad_token_id
        self.max_rows = max_rows

    def evaluate(self, progress: Progress) -> Record | None:
        """One evaluation line; None where nothing is held out."""
        if self.rows is None:
            return None
        rank = self.module.rank
        batches = list(
            iterate_eval(self.rows, self.batch_size, rank.rank, rank.world_size, self.pad_token_id, self.max_rows)
        )
        loss, _ = self.module.evaluate(batches)
        return {"step": progress.step, "eval_loss": loss, "eval_perplexity": perplexity(loss)}


def perplexity(loss: float) -> float:
    """``exp(loss)``, infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf

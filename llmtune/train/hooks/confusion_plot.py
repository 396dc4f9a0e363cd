"""Draw which classes were taken for which, at the end of the run."""

from __future__ import annotations

from pathlib import Path

from llmtune.engine.distributed import Rank
from llmtune.metrics.confusion_plot import draw_confusion
from llmtune.metrics.report import read_confusion
from llmtune.storage import layout
from llmtune.train.training_state import TrainingState


class ConfusionPlot:
    """Draw ``confusion_matrix.png``, where there is a ``confusion_matrix.json``."""

    def __init__(self, run: Path, rank: Rank):
        self.run = run
        self.rank = rank

    def on_start(self, progress: TrainingState) -> None:
        """Do nothing: there is nothing to draw yet."""

    def on_end(self, progress: TrainingState) -> None:  # noqa: ARG002 - as all hooks
        """Draw the table of the evaluation that the result stands for."""
        table = read_confusion(self.run) if self.rank.is_first else None
        if table is not None:
            draw_confusion(table, self.run / layout.CONFUSION_PLOT)

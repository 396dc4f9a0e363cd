"""Draw the loss curve at the end of the run."""

from __future__ import annotations

from pathlib import Path

from llmtune.engine.distributed import Rank
from llmtune.storage import layout
from llmtune.track.plot import write_loss_plot
from llmtune.train.training_state import TrainingState


class LossPlot:
    """Draw ``loss.png``."""

    def __init__(self, run: Path, run_name: str, rank: Rank):
        self.run = run
        self.run_name = run_name
        self.rank = rank

    def on_start(self, progress: TrainingState) -> None:
        """Do nothing: there is nothing to draw yet."""

    def on_end(self, progress: TrainingState) -> None:  # noqa: ARG002 - as all hooks
        """Draw the losses in ``metrics.jsonl``."""
        if self.rank.is_first:
            write_loss_plot(self.run / layout.METRICS, self.run / layout.LOSS_PLOT, self.run_name)

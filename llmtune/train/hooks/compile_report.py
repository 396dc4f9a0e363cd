"""Say at the end of a run what became of layers that were to be compiled."""

from __future__ import annotations

from llmtune.engine.distributed import Rank
from llmtune.model.compiled_layers import count_compiled
from llmtune.track.console import Console
from llmtune.train.training_state import TrainingState


class CompileReport:
    """Prints the numbers of graphs and of breaks on rank 0."""

    def __init__(self, layers: int, rank: Rank, console: Console):
        self.layers = layers
        self.rank = rank
        self.console = console
        self.begun_at = 0

    def on_start(self, progress: TrainingState) -> None:
        """Say that the first steps take longer."""
        self.begun_at = progress.step
        if self.rank.is_first:
            self.console.say(
                f"train.compile=layers: {self.layers} layers are compiled when they are first"
                f" called, so that step {progress.step + 1} takes a minute or more"
            )

    def on_end(self, progress: TrainingState) -> None:
        """Say what the compiler made of them."""
        if self.rank.is_first and progress.step > self.begun_at:
            self.console.say(count_compiled().describe(self.layers))

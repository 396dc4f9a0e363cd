"""The state of the training loop between two steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmtune.checkpoint.best import BestSoFar
from llmtune.plan.length.batch_schedule import Reached
from llmtune.train.line_sums import LineSums


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """The progress of a run."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    tokens: int = 0
    """Tokens seen, padding excluded."""
    skipped: int = 0
    """Steps that changed nothing; the schedule does not count them."""
    data_position: Mapping[str, Any] | None = None
    """Position in the data, as the loader describes it; None at the beginning."""
    evaluation_due: bool = False
    """An evaluation of this step was interrupted."""
    best: BestSoFar = field(default_factory=BestSoFar)
    """The best evaluation, and how many in a row have not improved on it."""
    line: LineSums = field(default_factory=LineSums)
    """Sums of the steps since the last line of ``metrics.jsonl``."""

    @property
    def reached(self) -> Reached:
        """Return how far the run is, as the size of the next step depends on it."""
        return Reached(self.step, self.tokens)

"""Detect losses and gradients that are not finite or that spike, name their rows, and react."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path

from llmtune.config.groups.train import OnNan
from llmtune.data.load.loader import StepBatch, Steps
from llmtune.engine.distributed import gather_objects
from llmtune.engine.train_module import StepResult, TrainModule
from llmtune.errors import DivergedError, RollbackError
from llmtune.storage.rank_files import SkippedSteps

#: Most and fewest steps that a spike is measured against.
_WINDOW = 64
_FEWEST = 16
#: A loss this many deviations above the mean is reported, and a gradient norm this many times the
#: median.
_DEVIATIONS = 6.0
_TIMES_MEDIAN = 10.0

#: Rows named in a message.
_NAMED_ROWS = 8

#: After this many rollbacks the rows are not the cause.
MAX_ROLLBACKS = 8


class DivergenceMonitor:
    """Check the result of every step, on every rank."""

    def __init__(
        self,
        module: TrainModule,
        loader: Steps,
        on_nan: OnNan,
        run: Path,
        say: Callable[[str], None],
    ):
        self.module = module
        self.loader = loader
        self.on_nan = on_nan
        self.say = say
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._norms: deque[float] = deque(maxlen=_WINDOW)
        self._run = run
        self._scaled = "fp16" in module.config
        self.skipped_steps = SkippedSteps.read(run).steps
        """Steps that a rollback leaves out."""

    def check(self, step: int, batch: StepBatch, result: StepResult) -> None:
        """Report a bad step, and end or roll back as ``train.on_nan`` says. Collective.

        Raises:
            DivergedError: ``train.on_nan=stop``, or too many rollbacks.
            RollbackError: ``train.on_nan=rollback``.
        """
        # In fp16 the loss scale is found by gradients that overflow.
        if math.isfinite(result.loss) and (result.applied or self._scaled):
            self._report_spike(step, result)
            return
        what = (
            f"step {step}: loss {result.loss}, gradient norm {result.grad_norm};"
            f" {self._find_bad_rows(batch)}"
        )
        if self.on_nan is OnNan.skip:
            self.say(f"{what}. The step is left out (train.on_nan=skip)")
        elif self.on_nan is OnNan.stop:
            raise DivergedError(what)
        else:
            self._roll_back(step, what)

    def _roll_back(self, step: int, what: str) -> None:
        if len(self.skipped_steps) >= MAX_ROLLBACKS:
            raise DivergedError(
                f"{what}. There were {MAX_ROLLBACKS} rollbacks in this run: the rows are not the"
                " cause"
            )
        if self.module.rank.is_first:
            SkippedSteps(self.skipped_steps | {step}).write(self._run)
        raise RollbackError(
            f"{what}. Going back to the newest checkpoint; this step is left out on the way"
        )

    def _find_bad_rows(self, batch: StepBatch) -> str:
        """Name the rows whose own loss is not finite; if there are none, the rows of the step."""
        # This rank's rows with their losses.
        losses = self.module.row_losses(batch.micro_batches)
        own: list[tuple[int, float]] = []
        for rows, row_losses in zip(batch.rows, losses, strict=True):
            own += [
                (row, loss) for row, loss in zip(rows, row_losses, strict=False) if row is not None
            ]

        # All ranks' rows.
        own_bad = [row for row, loss in own if not math.isfinite(loss)]
        of_ranks = gather_objects((own_bad, [row for row, _ in own]), self.module.rank)
        bad = [row for rank_bad, _ in of_ranks for row in rank_bad]
        # Ranks that share rows have the same ones.
        named = sorted({*bad} or {row for _, rank_rows in of_ranks for row in rank_rows})

        # Their files and lines.
        locations: list[str] = []
        for row in named[:_NAMED_ROWS]:
            locations += self.loader.locations(row)
        if not locations:
            return "the rows of a stream cannot be named"
        more = f" and {len(named) - _NAMED_ROWS} more" if len(named) > _NAMED_ROWS else ""
        subject = "the loss is not finite on" if bad else "the rows of the step are"
        return f"{subject} {', '.join(locations)}{more}"

    def _report_spike(self, step: int, result: StepResult) -> None:
        if len(self._losses) >= _FEWEST:
            mean = statistics.fmean(self._losses)
            # Not statistics.pstdev, whose fractions take a tenth of a short step.
            deviation = math.sqrt(statistics.fmean((loss - mean) ** 2 for loss in self._losses))
            norm = statistics.median(self._norms)
            if result.loss > mean + _DEVIATIONS * max(deviation, 0.01 * abs(mean)):
                self.say(
                    f"step {step}: the loss {result.loss:.4f} is a spike (mean of the last steps"
                    f" {mean:.4f})"
                )
            elif math.isfinite(result.grad_norm) and result.grad_norm > _TIMES_MEDIAN * norm > 0:
                self.say(
                    f"step {step}: the gradient norm {result.grad_norm:.3g} is a spike (median so"
                    f" far {norm:.3g})"
                )
        self._losses.append(result.loss)
        if math.isfinite(result.grad_norm):
            self._norms.append(result.grad_norm)

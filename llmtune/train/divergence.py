"""Losses and gradients that are not finite, or far from what they were: found, traced to their
rows, and acted on.
"""

from __future__ import annotations

import json
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
from llmtune.storage import layout
from llmtune.storage.atomic import read_json, write_atomically

#: Steps that a spike is measured against, and the fewest of them.
_WINDOW, _FEWEST = 64, 16
#: A loss this many deviations above the mean is reported, as is a gradient norm this many times the
#: median.
_DEVIATIONS, _TIMES = 6.0, 10.0

#: Rows named in a message.
_NAMED_ROWS = 8

#: After as many rollbacks it is not the rows.
MAX_ROLLBACKS = 8


class DivergenceMonitor:
    """Sees the result of every step, on every rank."""

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
        self._file = run / layout.SKIPPED_STEPS
        self._scaled = "fp16" in module.config
        self.skipped_steps = _read(self._file)
        """Steps that a rollback leaves out."""

    def check(self, step: int, batch: StepBatch, result: StepResult) -> None:
        """Report, and end or roll back where that is wanted. Collective.

        Raises:
            DivergedError: ``train.on_nan=stop``, or too many rollbacks.
            RollbackError: ``train.on_nan=rollback``.
        """
        # In fp16 a gradient that overflows is how the loss scale finds its place.
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
            write_atomically(self._file, json.dumps(sorted({*self.skipped_steps, step})))
        raise RollbackError(
            f"{what}. Going back to the newest checkpoint; this step is left out on the way"
        )

    def _find_bad_rows(self, batch: StepBatch) -> str:
        """The rows whose own loss is not finite; without one, those of the step."""
        losses = self.module.row_losses(batch.micro_batches)
        pairs = [
            (row, loss)
            for rows, of_rows in zip(batch.rows, losses, strict=True)
            # A flattened batch has one loss for all its rows.
            for row, loss in zip(
                rows, of_rows * (len(rows) if len(of_rows) == 1 else 1), strict=False
            )
            if row is not None
        ]
        everything = gather_objects(
            ([row for row, loss in pairs if not math.isfinite(loss)], [row for row, _ in pairs]),
            self.module.rank,
        )
        bad = [row for of_rank, _ in everything for row in of_rank]
        chosen = bad or [row for _, of_rank in everything for row in of_rank]
        locations = [
            place for row in sorted(chosen)[:_NAMED_ROWS] for place in self.loader.locations(row)
        ]
        more = f" and {len(chosen) - _NAMED_ROWS} more" if len(chosen) > _NAMED_ROWS else ""
        if not locations:
            return "the rows of a stream cannot be named"
        return (
            f"{'the loss is not finite on' if bad else 'the rows of the step are'}"
            f" {', '.join(locations)}{more}"
        )

    def _report_spike(self, step: int, result: StepResult) -> None:
        if len(self._losses) >= _FEWEST:
            mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
            norm = statistics.median(self._norms)
            if result.loss > mean + _DEVIATIONS * max(deviation, 0.01 * abs(mean)):
                self.say(
                    f"step {step}: the loss {result.loss:.4f} is a spike (mean of the last steps"
                    f" {mean:.4f})"
                )
            elif math.isfinite(result.grad_norm) and result.grad_norm > _TIMES * norm > 0:
                self.say(
                    f"step {step}: the gradient norm {result.grad_norm:.3g} is a spike (median so"
                    f" far {norm:.3g})"
                )
        self._losses.append(result.loss)
        if math.isfinite(result.grad_norm):
            self._norms.append(result.grad_norm)


def _read(file: Path) -> frozenset[int]:
    return frozenset(read_json(file) or ())

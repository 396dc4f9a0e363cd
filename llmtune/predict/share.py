"""The work of one process of a prediction: every so many windows that have no results yet."""

from __future__ import annotations

import time

from llmtune.predict.folder import JobFolder, Prepared
from llmtune.predict.request import PredictRequest
from llmtune.run.target import Target
from llmtune.task.task import find_task
from llmtune.track.console import Console
from llmtune.track.status import Status
from llmtune.units import format_seconds

#: Rows of a window: answers take seconds, labels do not.
ANSWER_WINDOW, LABEL_WINDOW = 64, 512


def predict_share(request: PredictRequest, rank: int, world_size: int, console: Console) -> None:
    """Predict the windows whose number leaves ``rank`` when divided by ``world_size``.

    Which process predicts a window changes none of its results.

    Args:
        console: Shows the progress of all processes; a silent one shows nothing.

    Raises:
        DoesNotFitError: Memory ran out.
        OSError: The disk refused.
    """
    folder = JobFolder(request.folder)
    prepared = folder.prepared
    assert prepared is not None
    size = window_size(request.target)
    mine = [
        window
        for window in range(rank, prepared.windows, world_size)
        if not folder.has_results(window)
    ]
    if not mine:
        return
    with Status(console, "loading the model"):
        from llmtune.predict.predictor import Predictor

        predictor = Predictor.load(request.target)
    line = _ProgressLine(console, folder, prepared, size)
    with Status(console, "predicting"):
        for window in mine:
            rows = folder.read_window(window)
            results = predictor.predict(rows, window * size, line.tell)
            folder.write_results(window, results)
            line.end_window()


def window_size(target: Target) -> int:
    """Rows of a window."""
    generates = find_task(target.config.model.task).generates
    return ANSWER_WINDOW if generates else LABEL_WINDOW


class _ProgressLine:
    """Shows the rows that are done, the speed and the time left."""

    def __init__(self, console: Console, folder: JobFolder, prepared: Prepared, size: int):
        self._console, self._folder = console, folder
        self._total, self._size = prepared.rows, size
        self._began, self._first = time.monotonic(), folder.count_results() * size
        self._shown = self._began
        self._in_window = 0

    def tell(self, rows: int) -> None:
        """Note rows of the window under way."""
        self._in_window += rows
        self._show()

    def end_window(self) -> None:
        """Note that the window has its results."""
        self._in_window = 0
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if not self._console.is_heard or now - self._shown < self._console.interval_seconds:
            return
        self._shown = now
        done = min(self._total, self._folder.count_results() * self._size + self._in_window)
        speed = (done - self._first) / (now - self._began)
        left = format_seconds((self._total - done) / speed) if speed > 0 else "-"
        self._console.progress(
            f"{done:,} of {self._total:,} rows  {speed:,.1f} rows/s  ETA {left}", passing=True
        )

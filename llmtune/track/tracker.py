"""The interface of everything that receives a run's records.

A tracker never stops a run: one that raises is logged and dropped.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from llmtune.errors import LlmtuneError

Record = dict[str, Any]
"""One line of ``metrics.jsonl``: it has ``step``, and ``loss`` or ``eval_loss``."""

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Receives every record of rank 0, in order."""

    def log(self, record: Record) -> None:
        """Take a record."""

    def finish(self) -> None:
        """Close; called when the run has ended, successfully or not."""


class SummaryTracker(Tracker, Protocol):
    """A tracker that also keeps values of the whole run, which is optional."""

    def summarize(self, values: Record) -> None:
        """Take values of the finished run, such as ``best_step`` and ``best_eval_loss``."""


def check_tracker(tracker: object) -> None:
    """Check that a tracker, or its class, has the methods of one.

    Raises:
        TypeError: One is missing.
    """
    name = tracker.__name__ if isinstance(tracker, type) else type(tracker).__name__
    for method in ("log", "finish"):
        if not callable(getattr(tracker, method, None)):
            raise TypeError(f"the tracker {name} has no method {method}")


class Trackers:
    """Several trackers as one; one that fails is logged and dropped."""

    def __init__(self, trackers: Sequence[Tracker], say: Callable[[str], None] = log.warning):
        """
        Args:
            say: Shows the user that a tracker was dropped.
        """
        self._trackers = list(trackers)
        self._say = say

    def log(self, record: Record) -> None:
        """Pass the record to each tracker.

        Raises:
            LlmtuneError: From a tracker that must not be dropped.
        """
        for tracker in list(self._trackers):
            try:
                tracker.log(record)
            except LlmtuneError:
                raise
            except Exception as error:
                self._drop(tracker, error)

    def summarize(self, values: Record) -> None:
        """Pass values of the finished run to each tracker that takes some."""
        for tracker in list(self._trackers):
            summarize = getattr(tracker, "summarize", None)
            if summarize is None:
                continue
            try:
                summarize(values)
            except Exception as error:
                self._drop(tracker, error)

    def finish(self) -> None:
        """Close each tracker."""
        for tracker in list(self._trackers):
            try:
                tracker.finish()
            except Exception as error:
                self._drop(tracker, error)

    def _drop(self, tracker: Tracker, error: Exception) -> None:
        log.exception("%s failed; the run continues without it", type(tracker).__name__)
        self._say(
            f"the tracker {type(tracker).__name__} failed and is left out"
            f" ({type(error).__name__}: {error}); train.log has the traceback"
        )
        self._trackers.remove(tracker)

"""The interface of everything that receives a run's records.

A tracker never stops a run: one that raises is logged and dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any, Protocol, runtime_checkable

from llmtune.errors import LlmtuneError

Record = dict[str, Any]
"""One line of ``metrics.jsonl``: it has ``step``, and ``loss`` or ``eval_loss``."""

log = logging.getLogger(__name__)


class Outcome(Enum):
    """The way in which a start of a run ended."""

    finished = "finished"
    stopped = "stopped"
    """A signal came and the state was saved: the same command resumes."""
    failed = "failed"


class LateError(Exception):
    """A tracker failed at a record that it had taken before."""

    def __init__(self, text: str, step: int | None):
        """
        Args:
            step: That of the last record which it has; None where there is none, or none is known.
        """
        super().__init__(text)
        self.step = step


class Tracker(Protocol):
    """Receives every record of rank 0, in order."""

    def log(self, record: Record, /) -> None:
        """Take a record."""

    def finish(self, outcome: Outcome, /) -> None:
        """Close; called once, however the run has ended."""


@runtime_checkable
class SummaryTracker(Protocol):
    """A tracker that also keeps values of the whole run, which is optional."""

    def summarize(self, values: Record, /) -> None:
        """Take values of the finished run, such as ``best_step`` and ``best_eval_loss``."""


@runtime_checkable
class WaitingTracker(Protocol):
    """A tracker that has more to do after ``finish`` has returned."""

    def wait(self, beat: Callable[[], None], is_stopped: Callable[[], bool], /) -> None:
        """Wait until it is done, or its time is over.

        Args:
            beat: Called at least every second, to show that the process makes progress.
            is_stopped: Tells whether the user or a scheduler waits for the process to end.
        """


@runtime_checkable
class AbandonableTracker(Protocol):
    """A tracker that leaves something behind when it does not end in time."""

    def abandon(self) -> None:
        """End it, from another thread than that which waits for it."""


def check_tracker(tracker: object) -> None:
    """Check that a tracker, or its class, has the methods of one.

    Raises:
        TypeError: One is missing.
    """
    name = tracker.__name__ if isinstance(tracker, type) else type(tracker).__name__
    for method in ("log", "finish"):
        if not callable(getattr(tracker, method, None)):
            raise TypeError(f"the tracker {name} has no method {method}")


def numbers_of(record: Record) -> Iterator[tuple[str, float]]:
    """Yield keys and numbers of a record, whatever keys it has; without its step."""
    for key, value in record.items():
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
            yield key, float(value)


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
            if not isinstance(tracker, SummaryTracker):
                continue
            try:
                tracker.summarize(values)
            except Exception as error:
                self._drop(tracker, error)

    def finish(
        self,
        outcome: Outcome,
        beat: Callable[[], None] = lambda: None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Close each tracker, and wait for those that have more to do.

        Args:
            beat: Called at least every second, to show that the process makes progress.
            is_stopped: Tells whether the user or a scheduler waits for the process to end.
        """
        for tracker in list(self._trackers):
            try:
                tracker.finish(outcome)
            except Exception as error:
                self._drop(tracker, error)
        # All of them use the time at once.
        for tracker in self._trackers:
            if isinstance(tracker, WaitingTracker):
                tracker.wait(beat, is_stopped)

    def _drop(self, tracker: Tracker, error: Exception) -> None:
        log.exception("%s failed; the run continues without it", type(tracker).__name__)
        self._say(
            f"the tracker {type(tracker).__name__} failed and is left out"
            f" ({type(error).__name__}: {error}); train.log has the traceback"
        )
        self._trackers.remove(tracker)

"""A tracker that works in a thread of its own, so that training never waits for it.

Libraries of trackers write to disks and networks within ``log``, or hand over to a process that may
be gone. Here a record costs the training thread a place in a queue, whatever the library does. The
other thread looks into the queue a few times in a second: if each record woke it, it would take
Python's lock from a training thread whose steps are short.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from llmtune.track.tracker import (
    AbandonableTracker,
    LateError,
    Outcome,
    Record,
    SummaryTracker,
    Tracker,
    check_tracker,
)

#: Records that may wait for a tracker. The next ones are lost to it, not to ``metrics.jsonl``.
CAPACITY = 10_000
#: Seconds that a tracker has at the end, by how the run ended; a user or a scheduler waits for a
#: run that stops.
FINISH_SECONDS = {Outcome.finished: 300.0, Outcome.stopped: 20.0, Outcome.failed: 20.0}
#: The same for a finished run whose files are stored.
FINISH_SECONDS_WITH_FILES = 3600.0
_POLL_SECONDS = 0.5
#: Seconds between two looks into the queue.
_PAUSE_SECONDS = 0.25

log = logging.getLogger(__name__)


class BackgroundTracker:
    """Opens a tracker and hands everything on to it, in order, from another thread.

    One that cannot be opened, fails or hangs is left out, and the user is told what it lacks.
    """

    def __init__(
        self,
        title: str,
        open_tracker: Callable[[], Tracker],
        say: Callable[[str], None],
        stores_files: bool = False,
    ):
        """
        Args:
            title: The tracker's name for people.
            open_tracker: Opens it; called in the other thread.
            say: Shows a line to the user; called from both threads.
            stores_files: It stores models at the end, for which it gets more time.
        """
        self._stores_files = stores_files
        self._title = title
        self._open = open_tracker
        self._say = say
        self._calls: SimpleQueue[Callable[[Tracker], None]] = SimpleQueue()
        self._lost = 0
        self._step: int | None = None
        self._has_ended = self._is_closing = False
        self._is_last = threading.Event()
        self._tracker: Tracker | None = None
        self._is_abandoned = False
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._work, name=f"track {title}", daemon=True)
        self._thread.start()

    def log(self, record: Record) -> None:
        """Queue a record."""
        if self._has_ended:
            return
        if self._calls.qsize() >= CAPACITY:
            self._lost += 1
            return
        self._calls.put(lambda tracker: self._log(tracker, record))

    def summarize(self, values: Record) -> None:
        """Queue values of the finished run."""
        self._calls.put(lambda tracker: _summarize(tracker, values))

    def finish(self, outcome: Outcome) -> None:
        """Queue the end; :meth:`wait` waits for it."""
        seconds = FINISH_SECONDS[outcome]
        if self._stores_files and outcome is Outcome.finished:
            seconds = FINISH_SECONDS_WITH_FILES
        self._deadline = time.monotonic() + seconds
        self._calls.put(lambda tracker: self._close(tracker, outcome))
        self._is_last.set()

    def wait(
        self, beat: Callable[[], None], is_stopped: Callable[[], bool] = lambda: False
    ) -> None:
        """Wait until the tracker has closed, or its time is over, and tell what it lacks.

        A signal that comes meanwhile leaves it the time of a run that stops.
        """
        is_hurried = False
        while self._thread.is_alive() and (left := self._deadline - time.monotonic()) > 0:
            self._thread.join(min(_POLL_SECONDS, left))
            beat()
            if not is_hurried and is_stopped():
                is_hurried = True
                seconds = FINISH_SECONDS[Outcome.stopped]
                self._deadline = min(self._deadline, time.monotonic() + seconds)
        if self._thread.is_alive():
            self._is_abandoned = True
            tracker = self._tracker
            if tracker is not None and isinstance(tracker, AbandonableTracker):
                tracker.abandon()
            waiting = self._calls.qsize()
            self._say(
                f"{self._title} did not close in time and is left alone after it took"
                f" {_describe(self._step)}; {waiting} more calls wait for it. metrics.jsonl has"
                " all records"
            )
        if self._lost:
            self._say(
                f"{self._title} took no records for a while and lacks {self._lost} of them;"
                " metrics.jsonl has all"
            )

    def _work(self) -> None:
        what = "cannot be opened"
        try:
            self._tracker = tracker = self._open()
            check_tracker(tracker)
            while not self._is_closing:
                self._is_last.wait(_PAUSE_SECONDS)
                while not self._is_closing and not self._calls.empty():
                    what = f"failed after {_describe(self._step)}"
                    self._calls.get()(tracker)
        except BaseException as error:
            if self._is_abandoned:
                return
            # Nobody but the user is there to catch it, be it a library's SystemExit.
            if isinstance(error, LateError):
                what = f"failed after step {error.step}" if error.step is not None else "has failed"
            log.exception("%s %s", self._title, what)
            self._say(
                f"{self._title} {what} and is left out ({type(error).__name__}: {error});"
                " metrics.jsonl has all records, train.log the traceback"
            )
        finally:
            self._has_ended = True

    def _log(self, tracker: Tracker, record: Record) -> None:
        tracker.log(record)
        self._step = record["step"]

    def _close(self, tracker: Tracker, outcome: Outcome) -> None:
        self._is_closing = True
        tracker.finish(outcome)


def _describe(step: int | None) -> str:
    return "no record" if step is None else f"step {step}"


def _summarize(tracker: Tracker, values: Record) -> None:
    if isinstance(tracker, SummaryTracker):
        tracker.summarize(values)

"""Show what a command is doing while it writes nothing, so that nobody thinks it hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from llmtune.track.console import Console
from llmtune.units import format_seconds

#: Seconds of silence before a line. What is measured of silence is more than that by what threads
#: wait for a busy machine and for Python's lock; nothing is to be silent for 10 seconds.
QUIET_SECONDS = 7.0
#: Of silence before a program's first line. What it imports then holds Python's lock for seconds at
#: a time, in which no thread can speak: on a slow machine the line comes before that.
QUIET_AT_START_SECONDS = 3.0
#: Who takes over from somebody else, such as another process, does not know when that wrote its
#: last line, and takes it to be so many seconds ago.
HANDED_OVER_SECONDS = 4.5
#: Seconds between two looks, and between two updates of a line that replaces itself.
_POLL_SECONDS, _UPDATE_SECONDS = 0.25, 1.0


class Status:
    """Watches a console from a thread until the block ends, and shows the current activity.

    A line names the activity, how far it is, and its duration. On a terminal the next line replaces
    it. Of blocks within each other on one console, the innermost one speaks.
    """

    def __init__(
        self,
        console: Console,
        doing: str | Callable[[], str | None],
        how_far: Callable[[], str] = lambda: "",
        quiet_seconds: float = QUIET_SECONDS,
    ):
        """
        Args:
            doing: The activity, such as ``loading the model``, or a function that returns the
                current one, None for none.
            how_far: Returns how far it is, such as ``3 of 8 rows``; empty where that is not known.
        """
        self.doing = doing
        self.how_far = how_far
        self._console = console
        self._quiet = quiet_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="status", daemon=True)

    def __enter__(self) -> Status:
        self._console.watched_by.append(self)
        if self._console.is_heard:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._console.watched_by.remove(self)
        self._console.clear_passing()

    def _watch(self) -> None:
        activity: str | None = None
        since = time.monotonic()
        handed_over = float("-inf")
        is_shown = False
        while not self._ended.wait(min(_POLL_SECONDS, self._quiet / 4)):
            now = time.monotonic()
            if self._console.watched_by[-1] is not self:
                handed_over, is_shown = now, False
                continue
            doing = self.doing if isinstance(self.doing, str) else self.doing()
            if doing != activity:
                activity, since = doing, now
            quiet = _UPDATE_SECONDS if is_shown and self._console.is_terminal else self._quiet
            if doing is None:
                handed_over = now
            silent_seconds = now - max(self._console.said_at, handed_over - HANDED_OVER_SECONDS)
            is_shown = is_shown and silent_seconds <= quiet + _UPDATE_SECONDS
            if activity is None or silent_seconds < quiet:
                continue
            far = self.how_far()
            text = f"{activity}, {far}" if far else activity
            self._console.progress(f"{text} ... {format_seconds(now - since)}", passing=True)
            is_shown = True

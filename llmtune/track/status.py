"""Show what a command is doing after a while of silence, so that nobody thinks it hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from llmtune.track.console import Console
from llmtune.units import format_seconds

#: Seconds of silence before the first line about an activity. Later waits double, up to the second.
QUIET_SECONDS, MOST_SECONDS = 5.0, 60.0
_POLL_SECONDS = 0.5


class Status:
    """Watches a console from a thread until the block ends, and shows the current activity.

    A line names the activity and its duration. On a terminal the next line replaces it. Elsewhere
    lines stay, so that a long activity gets fewer and fewer of them.
    """

    def __init__(
        self,
        console: Console,
        doing: str | Callable[[], str | None],
        quiet_seconds: float = QUIET_SECONDS,
    ):
        """
        Args:
            doing: The activity, such as ``loading the model``, or a function that returns the
                current one, None for none.
        """
        self.doing = doing
        self._console = console
        self._quiet = quiet_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="status", daemon=True)

    def __enter__(self) -> Status:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._console.clear_passing()

    def _watch(self) -> None:
        activity: str | None = None
        since, wait_seconds = time.monotonic(), self._quiet
        while not self._ended.wait(min(_POLL_SECONDS, self._quiet / 2)):
            doing = self.doing if isinstance(self.doing, str) else self.doing()
            now = time.monotonic()
            if doing != activity:
                activity, since, wait_seconds = doing, now, self._quiet
            silent_seconds = now - max(self._console.said_at, since)
            if activity is None or silent_seconds < wait_seconds:
                continue
            self._console.progress(f"{activity} ... {format_seconds(now - since)}", passing=True)
            if not self._console.is_terminal:
                wait_seconds = min(2 * wait_seconds, MOST_SECONDS)

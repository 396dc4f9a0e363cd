"""What is under way, told where nothing was said for a while: nobody should wonder whether a
command hangs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from llmtune.track.console import Console
from llmtune.units import format_seconds

# : Seconds of silence before the first line, and the most between two lines about one thing; in
# between they double.
QUIET_SECONDS, MOST_SECONDS = 5.0, 60.0
_POLL_SECONDS = 0.5


class Status:
    """Watches a console in a thread of its own, until the block ends.

    A line says what is done and for how long. On a terminal it is written over by the next line;
    elsewhere, where each line stays, a thing that takes long gets fewer and fewer of them.
    """

    def __init__(
        self,
        console: Console,
        doing: str | Callable[[], str | None],
        quiet_seconds: float = QUIET_SECONDS,
    ):
        """
        Args:
            doing: What is done, such as ``loading the model``. Asked for again and again where it
                is a function; None where there is nothing to say.
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
        told, since, patience = None, time.monotonic(), self._quiet
        while not self._ended.wait(min(_POLL_SECONDS, self._quiet / 2)):
            doing = self.doing if isinstance(self.doing, str) else self.doing()
            now = time.monotonic()
            if doing != told:
                told, since, patience = doing, now, self._quiet
            if doing is None or now - max(self._console.said_at, since) < patience:
                continue
            self._console.progress(f"{doing} ... {format_seconds(now - since)}", passing=True)
            if not self._console.is_terminal:
                patience = min(2 * patience, MOST_SECONDS)

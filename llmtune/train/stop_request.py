"""Stop on request: by a signal to any rank, or by a file named SAVE in the run folder.

All ranks agree before one acts on it.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from types import FrameType

from llmtune.engine.distributed import Rank, all_reduce_any
from llmtune.errors import EXIT_STOPPED
from llmtune.process import STOP_SIGNALS, without_ignored
from llmtune.storage import layout


class Stop:
    """A stop request, checked between steps, micro-batches and evaluation batches.

    Before :meth:`arm` a signal ends the rank at once, because there is nothing to save.
    """

    def __init__(self, rank: Rank, run: Path):
        self._rank = rank
        self._file = run / layout.SAVE_REQUEST
        self._signaled = False
        self._armed = False
        self._agreed = False
        for stop_signal in without_ignored(STOP_SIGNALS):
            signal.signal(stop_signal, self._handle)

    @property
    def is_signaled(self) -> bool:
        """Tell whether this rank has had a signal."""
        return self._signaled

    def arm(self) -> None:
        """Let signals stop the run after a save, from here on."""
        self._armed = True

    def requested(self) -> bool:
        """Tell whether any rank was asked to stop. Collective."""
        return self.agree()[0]

    def agree(self, *others: bool) -> list[bool]:
        """Tell whether any rank was asked to stop, and which of ``others`` are true on any rank.

        This is one collective.
        """
        asked = self._signaled or (self._rank.is_first and self._file.exists())
        stop, *agreed = all_reduce_any([asked, *others], self._rank)
        self._agreed = self._agreed or stop
        if stop and self._rank.is_first:
            # Consume the request, so that rerunning the command resumes instead of stopping again.
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)
        return [self._agreed, *agreed]

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if not self._armed:
            os._exit(EXIT_STOPPED)
        self._signaled = True

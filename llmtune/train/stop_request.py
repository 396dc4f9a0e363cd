"""Stopping when asked: by a signal to any rank, or by a file named SAVE in the run folder; agreed
on by all ranks.
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
    """Looked at between steps, micro-batches and evaluation batches. Before :meth:`arm` a signal
    ends the rank at once: there is nothing to save."""

    def __init__(self, rank: Rank, run: Path):
        self._rank = rank
        self._file = run / layout.SAVE_REQUEST
        self._signaled = False
        self._armed = False
        self._agreed = False
        for number in without_ignored(STOP_SIGNALS):
            signal.signal(number, self._handle)

    def arm(self) -> None:
        """From here on there is something to save."""
        self._armed = True

    def requested(self) -> bool:
        """Whether any rank was asked to stop. Collective."""
        return self.agree()[0]

    def agree(self, *others: bool) -> list[bool]:
        """Whether any rank was asked to stop, and which of ``others`` are true on any: one
        collective.
        """
        asked = self._signaled or (self._rank.is_first and self._file.exists())
        stop, *found = all_reduce_any([asked, *others], self._rank)
        self._agreed = self._agreed or stop
        if stop and self._rank.is_first:
            # Heard: the same command is to go on, not to stop again.
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)
        return [self._agreed, *found]

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if not self._armed:
            os._exit(EXIT_STOPPED)
        self._signaled = True

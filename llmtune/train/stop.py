"""Stopping on a signal: a flag that the loop looks at between steps, agreed on by all ranks."""

from __future__ import annotations

import signal
from types import FrameType

from llmtune.engine.distributed import Rank, any_rank


class StopFlag:
    """Set by SIGTERM or SIGINT on any rank."""

    def __init__(self) -> None:
        self._set = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def requested(self, rank: Rank) -> bool:
        """Whether any rank was asked to stop. Collective."""
        return any_rank(self._set, rank)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._set = True

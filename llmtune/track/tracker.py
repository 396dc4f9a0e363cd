"""The interface of everything that looks on.

A tracker never stops a run: what it raises is noted and it is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

from llmtune.errors import LlmtuneError

Record = dict[str, Any]
"""One line of ``metrics.jsonl``: it has ``step``, and ``loss`` or ``eval_loss``."""

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Sees every record of rank 0, in order."""

    def log(self, record: Record) -> None:
        """One record."""

    def finish(self) -> None:
        """The run has ended, well or not."""


class Trackers:
    """Several trackers as one; a failing one is dropped with a note in the log."""

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = list(trackers)

    def log(self, record: Record) -> None:
        """Hand the record to each."""
        for tracker in list(self._trackers):
            try:
                tracker.log(record)
            except LlmtuneError:
                raise
            except Exception:
                self._drop(tracker)

    def finish(self) -> None:
        """Close each."""
        for tracker in list(self._trackers):
            try:
                tracker.finish()
            except Exception:
                self._drop(tracker)

    def _drop(self, tracker: Tracker) -> None:
        log.exception("%s failed and is left out from here on", type(tracker).__name__)
        self._trackers.remove(tracker)

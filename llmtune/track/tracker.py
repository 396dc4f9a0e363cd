"""The interface of everything that receives a run's records.

A tracker never stops a run: one that raises is logged and dropped.
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
    """Receives every record of rank 0, in order."""

    def log(self, record: Record) -> None:
        """Take a record."""

    def finish(self) -> None:
        """Close; called when the run has ended, successfully or not."""


class Trackers:
    """Several trackers as one; one that fails is logged and dropped."""

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = list(trackers)

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
            except Exception:
                self._drop(tracker)

    def finish(self) -> None:
        """Close each tracker."""
        for tracker in list(self._trackers):
            try:
                tracker.finish()
            except Exception:
                self._drop(tracker)

    def _drop(self, tracker: Tracker) -> None:
        log.exception("%s failed; the run continues without it", type(tracker).__name__)
        self._trackers.remove(tracker)

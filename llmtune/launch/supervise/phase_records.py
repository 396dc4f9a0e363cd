"""Read the ranks' phase records: the last finished step, and whether the run makes progress."""

import time
from pathlib import Path

from llmtune.storage.phase_record import PhaseRecord
from llmtune.storage.rank_files import read_phase, read_raw_phase

#: Phases that follow the step which they name.
_AFTER_STEP = ("evaluate", "save", "answer", "trace", "finish")
#: Phases in which nothing is recorded for long: imports, weights, answers that are generated.
_WITHOUT_NOTES = ("start", "load", "answer")
_WITHOUT_NOTES_FACTOR = 10

#: Most seconds that count as watched between two looks.
_LONGEST_LOOK = 1.0


def finished_step(folder: Path, world_size: int) -> int:
    """Return the last optimizer step that is known to be done; 0 where none is."""
    return max(_finished(read_phase(folder, rank)) for rank in range(world_size))


def _finished(record: PhaseRecord) -> int:
    return record.step if record.phase in _AFTER_STEP else max(0, record.step - 1)


class HangDetector:
    """Detects a hang: no record has changed for ``timeout_seconds``.

    One stuck rank blocks all others at their next collective.
    """

    def __init__(self, folder: Path, world_size: int, timeout_seconds: float):
        self._folder = folder
        self._ranks = range(world_size)
        self._timeout = timeout_seconds
        self._records: list[bytes] = []
        self._still_seconds = 0.0
        self._looked = time.monotonic()

    def is_hung(self) -> bool:
        """Compare the records with those of the last call.

        Time without a call does not count: a run on a machine that was suspended does not hang.
        """
        now = time.monotonic()
        self._still_seconds += min(now - self._looked, _LONGEST_LOOK)
        self._looked = now
        records = [read_raw_phase(self._folder, rank) for rank in self._ranks]
        if records != self._records:
            self._records = records
            self._still_seconds = 0.0
        if self._still_seconds < self._timeout:
            return False
        phases = [read_phase(self._folder, rank).phase for rank in self._ranks]
        patient = any(phase in _WITHOUT_NOTES for phase in phases)
        return self._still_seconds >= self._timeout * (_WITHOUT_NOTES_FACTOR if patient else 1)

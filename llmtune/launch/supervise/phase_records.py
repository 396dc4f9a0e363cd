"""What the ranks' phase records tell: how far they came, and whether they still get on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from llmtune.launch.supervise.out_of_memory import phase_file

#: Phases that follow the step which they name.
_AFTER_STEP = ("evaluate", "save", "answer")
#: Phases in which nothing is noted for a long time: imports, weights, answers that are generated.
_WITHOUT_NOTES = ("start", "load", "answer")
_WITHOUT_NOTES_FACTOR = 10

#: Most seconds that count as watched between two looks.
_LONGEST_LOOK = 1.0


def read_phase(folder: Path, rank: int) -> dict[str, Any]:
    """The record of a rank, as :class:`~llmtune.engine.heartbeat.PhaseLog` writes it; ``start``
    where there is none yet.
    """
    try:
        return dict(json.loads(_read(folder, rank)))
    except ValueError:
        return {"phase": "start", "step": 0}


def finished_step(folder: Path, world_size: int) -> int:
    """The last optimizer step that is known to be done; 0 where none is."""
    return max(_finished(read_phase(folder, rank)) for rank in range(world_size))


def _finished(record: dict[str, Any]) -> int:
    step = int(record["step"])
    return step if record["phase"] in _AFTER_STEP else max(0, step - 1)


def _read(folder: Path, rank: int) -> bytes:
    try:
        return phase_file(folder, rank).read_bytes()
    except OSError:
        return b""


class HangDetector:
    """Sees that no rank gets on. One that is stuck holds up all others at their next collective."""

    def __init__(self, folder: Path, world_size: int, timeout_seconds: float):
        self._folder = folder
        self._ranks = range(world_size)
        self._timeout = timeout_seconds
        self._records: list[bytes] = []
        self._still_seconds = 0.0
        self._looked = time.monotonic()

    def is_hung(self) -> bool:
        """Look.

        Time in which nobody looked does not count: a machine that was suspended is not a run that
        hangs.
        """
        now = time.monotonic()
        self._still_seconds += min(now - self._looked, _LONGEST_LOOK)
        self._looked = now
        records = [_read(self._folder, rank) for rank in self._ranks]
        if records != self._records:
            self._records = records
            self._still_seconds = 0.0
        if self._still_seconds < self._timeout:
            return False
        phases = [read_phase(self._folder, rank)["phase"] for rank in self._ranks]
        patient = any(phase in _WITHOUT_NOTES for phase in phases)
        return self._still_seconds >= self._timeout * (_WITHOUT_NOTES_FACTOR if patient else 1)

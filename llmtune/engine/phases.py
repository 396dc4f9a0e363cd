"""Where a rank stands, written where the supervisor can read it after the rank is gone, however it went."""

from __future__ import annotations

import json
import os
import resource
import threading
from pathlib import Path

#: Bytes of the record; written over itself at every change, in one call.
_WIDTH = 160


class PhaseLog:
    """Phase, step and peak memory of one rank; phases are ``start load forward backward step evaluate save``.

    A record that no longer changes is how the supervisor knows that a run hangs, so that every write counts up.
    """

    def __init__(self, path: Path | None = None):
        self.step = 0
        """The optimizer step under way, from 1; 0 before the first."""
        self._phase = "start"
        self._beats = 0
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600) if path is not None else None

    def enter(self, phase: str) -> None:
        """Note the phase; costs a system call."""
        with self._lock:
            self._phase = phase
            self._write()

    def beat(self) -> None:
        """Say that long work within a phase gets on; from any thread."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        self._beats += 1
        # In kB on Linux.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        record = {"phase": self._phase, "step": self.step, "peak_bytes": peak, "beats": self._beats}
        os.pwrite(self._file, json.dumps(record).ljust(_WIDTH).encode(), 0)

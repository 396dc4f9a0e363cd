"""Where a rank stands, written where the supervisor can read it after the rank is gone, however it went."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

#: Bytes of the record; written over itself at every change, in one call.
_WIDTH = 160


class PhaseLog:
    """Phase, step and peak memory of one rank; phases are ``load forward backward step evaluate save``."""

    def __init__(self, path: Path | None = None):
        self.step = 0
        """The optimizer step under way, from 1; 0 before the first."""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600) if path is not None else None

    def enter(self, phase: str) -> None:
        """Note the phase; costs a system call."""
        if self._file is None:
            return
        # In kB on Linux.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        record = json.dumps({"phase": phase, "step": self.step, "peak_bytes": peak})
        os.pwrite(self._file, record.ljust(_WIDTH).encode(), 0)

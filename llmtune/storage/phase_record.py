"""The phase of a rank, which it writes over and over, for its supervisor to read.

:mod:`llmtune.storage.rank_files` says where, and reads it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

#: Bytes of a phase record, which is written over itself in one call.
_PHASE_WIDTH = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRecord:
    """The phase that a rank is in, and its memory; readable however the rank ends."""

    phase: str = "start"
    """One of ``start load answer data forward backward step evaluate save trace finish``."""
    step: int = 0
    """The optimizer step under way, from 1; 0 before the first."""
    peak_bytes: int = 0
    """Most memory that was resident on the host."""
    beats: int = 0
    """Counts the records, so that no two are the same while the rank makes progress."""
    device_peak_bytes: int = 0
    """Most memory that torch allocated on the GPU."""
    at_limit: str | None = None
    """``device`` or ``host``, where the rank has nearly all the memory that it may have."""

    @staticmethod
    def open(path: Path) -> int:
        """Open a descriptor to write records to."""
        return os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)

    def write(self, descriptor: int) -> None:
        """Overwrite the previous record, with one system call."""
        os.pwrite(descriptor, json.dumps(asdict(self)).ljust(_PHASE_WIDTH).encode(), 0)

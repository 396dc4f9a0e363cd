"""Where a rank stands, written where the supervisor can read it after the rank is gone, however it
went.
"""

from __future__ import annotations

import json
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

#: Bytes of the record; written over itself at every change, in one call.
_WIDTH = 240
#: A rank that has this share of its limit is near enough to it for its end to be suspicious.
_NEAR_LIMIT = 0.9
#: Phases that may last.
_FOR_PEOPLE = {
    "start": "starting the ranks",
    "load": "loading the model",
    "answer": "answering held-out prompts",
    "evaluate": "taking the held-out loss",
    "save": "saving",
}
#: Between two looks at the memory of a GPU.
_DEVICE_SECONDS = 0.5


class PhaseLog:
    """Phase, step and peak memory of one rank; phases are ``start load answer forward backward step
    evaluate save``.

    A record that no longer changes is how the supervisor knows that a run hangs, so that every
    write counts up.
    """

    def __init__(self, path: Path | None = None):
        self.step = 0
        """The optimizer step under way, from 1; 0 before the first."""
        self.device_peak: Callable[[], tuple[int, int]] = lambda: (0, 0)
        """Bytes that were allocated on the GPU at most, and those that may be."""
        self._seen, self._seen_at = (0, 0), 0.0
        self._phase = "start"
        self._first_step: int | None = None
        self._beats = 0
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600) if path is not None else None

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Another phase for the length of the block."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def enter(self, phase: str) -> None:
        """Note the phase; costs a system call."""
        with self._lock:
            self._phase = phase
            if self._first_step is None and phase == "forward":
                self._first_step = self.step
            self._write()

    def describe(self) -> str | None:
        """What the rank does, for people; None in the steps after its first, each of which has a
        line of its own.
        """
        if self._phase in _FOR_PEOPLE:
            return _FOR_PEOPLE[self._phase]
        return (
            f"step {self.step}, the first of this start" if self.step == self._first_step else None
        )

    def beat(self) -> None:
        """Say that long work within a phase gets on; from any thread."""
        with self._lock:
            self._seen_at = 0.0
            self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        self._beats += 1
        # In kB on Linux.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        # torch gathers all its statistics to answer, which short steps would feel.
        if time.monotonic() - self._seen_at > _DEVICE_SECONDS:
            self._seen_at, self._seen = time.monotonic(), self.device_peak()
        device_peak, device_limit = self._seen
        record = {"phase": self._phase, "step": self.step, "peak_bytes": peak, "beats": self._beats}
        if device_peak:
            record["device_peak_bytes"] = device_peak
        if device_peak > _NEAR_LIMIT * device_limit > 0:
            record["at_limit"] = "device"
        elif _is_near_limit():
            record["at_limit"] = "host"
        os.pwrite(self._file, json.dumps(record).ljust(_WIDTH).encode(), 0)


def _is_near_limit() -> bool:
    """Whether this process has nearly all that ``RLIMIT_DATA`` gives it; the kernel counts what was
    asked for, used or not.
    """
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if limit == resource.RLIM_INFINITY:
        return False
    with Path("/proc/self/status").open() as status:
        kilobytes = next((int(line.split()[1]) for line in status if line.startswith("VmData:")), 0)
    return kilobytes * 1024 > _NEAR_LIMIT * limit

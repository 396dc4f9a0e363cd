"""Record the phase of a rank where the supervisor can read it, however the rank ends."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtune.storage.rank_files import PhaseRecord

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
    """Keeps the phase record of one rank.

    A record that no longer changes is how the supervisor recognizes a hang, so that every write
    counts up.
    """

    def __init__(self, path: Path | None = None):
        self.step = 0
        """The optimizer step under way, from 1; 0 before the first."""
        self.device_peak: Callable[[], tuple[int, int]] = lambda: (0, 0)
        """Returns the most bytes that were allocated on the GPU, and how many may be."""
        self._seen, self._seen_at = (0, 0), 0.0
        self._phase = "start"
        self._first_step: int | None = None
        self._beats = 0
        self._lock = threading.Lock()
        self._file = PhaseRecord.open(path) if path is not None else None

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
        """Describe the phase for people; None in the steps after the first, which are logged."""
        if self._phase in _FOR_PEOPLE:
            return _FOR_PEOPLE[self._phase]
        return (
            f"step {self.step}, the first of this start" if self.step == self._first_step else None
        )

    def beat(self) -> None:
        """Record that long work within a phase makes progress; from any thread."""
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
        at_limit = None
        if device_peak > _NEAR_LIMIT * device_limit > 0:
            at_limit = "device"
        elif _is_near_limit():
            at_limit = "host"
        PhaseRecord(
            phase=self._phase,
            step=self.step,
            peak_bytes=peak,
            beats=self._beats,
            device_peak_bytes=device_peak,
            at_limit=at_limit,
        ).write(self._file)


def _is_near_limit() -> bool:
    """Tell whether this process has nearly all that ``RLIMIT_DATA`` allows.

    The kernel counts what was allocated, used or not.
    """
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if limit == resource.RLIM_INFINITY:
        return False
    with Path("/proc/self/status").open() as status:
        kilobytes = next((int(line.split()[1]) for line in status if line.startswith("VmData:")), 0)
    return kilobytes * 1024 > _NEAR_LIMIT * limit

"""Write a rank's phase, step and peak memory to a file that the supervisor reads.

The file outlives the rank, however it ends.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtune.engine.phases.phase_clock import PhaseClock
from llmtune.storage.phase_record import PhaseRecord

#: From this share of its limit on, a rank's end is taken for a lack of memory.
_NEAR_LIMIT = 0.9
#: Phases that are no part of a step, in words.
_PHASES = {
    "start": "starting the ranks",
    "load": "loading the model",
    "answer": "answering held-out prompts",
    "evaluate": "taking the held-out loss",
    "save": "saving",
    "trace": "writing the trace of the steps",
    "finish": "waiting for trackers and copies",
}
#: Those of a step.
_STEP_PHASES = {
    "data": "waiting for data",
    "forward": "forward pass",
    "backward": "backward pass",
    "step": "optimizer step",
}
#: Seconds between two readings of a GPU's memory.
_DEVICE_SECONDS = 0.5


class PhaseLog:
    """The phase, step and peak memory of one rank.

    Phases are ``start load answer data forward backward step evaluate save trace finish``. The
    supervisor detects a hang by a record that no longer changes; therefore every write increments
    ``beats``.
    """

    def __init__(self, path: Path | None = None):
        self.step = 0
        """The current optimizer step, from 1; 0 before the first."""
        self.device_peak: Callable[[], tuple[int, int]] = lambda: (0, 0)
        """Returns the peak bytes allocated on the GPU, and their limit."""
        self.clock = PhaseClock()
        """Adds up the seconds of the phases."""
        self._device_peak = (0, 0)
        self._device_peak_at = 0.0
        self._phase = "start"
        self._how_far = ""
        self._first_step: int | None = None
        self._beats = 0
        self._lock = threading.Lock()
        self._file = PhaseRecord.open(path) if path is not None else None

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Set another phase for the duration of the block."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def enter(self, phase: str, how_far: str = "") -> None:
        """Record the phase, with one system call. Called from the main thread.

        Args:
            how_far: As for :meth:`tell`.
        """
        self.clock.enter(phase)
        with self._lock:
            self._phase, self._how_far = phase, how_far
            if self._first_step is None and phase == "forward":
                self._first_step = self.step
            self._write()

    def tell(self, how_far: str) -> None:
        """Note how far the phase is, for people: ``batch 3 of 8``."""
        self._how_far = how_far

    def describe(self) -> str:
        """Describe what the rank does."""
        if self._phase in _PHASES:
            return _PHASES[self._phase]
        is_first = self._first_step in (None, self.step)
        return f"step {self.step}, the first of this start" if is_first else f"step {self.step}"

    def describe_place(self) -> str:
        """Describe how far the phase is; empty where that is not known."""
        parts = [_STEP_PHASES.get(self._phase, ""), self._how_far]
        return ", ".join(filter(None, parts))

    def beat(self) -> None:
        """Record that long work within a phase makes progress. Called from any thread."""
        with self._lock:
            self._device_peak_at = 0.0
            self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        self._beats += 1
        # Linux reports kB.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        # torch collects all its statistics for this, which would slow down short steps.
        if time.monotonic() - self._device_peak_at > _DEVICE_SECONDS:
            self._device_peak_at, self._device_peak = time.monotonic(), self.device_peak()
        device_peak, device_limit = self._device_peak

        # For the supervisor: a rank that ends near its limit may have run out of memory.
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
    """Tell whether this process is near ``RLIMIT_DATA``, which counts unused memory too."""
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if limit == resource.RLIM_INFINITY:
        return False
    with Path("/proc/self/status").open() as status:
        kilobytes = next((int(line.split()[1]) for line in status if line.startswith("VmData:")), 0)
    return kilobytes * 1024 > _NEAR_LIMIT * limit

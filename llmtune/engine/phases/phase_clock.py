"""Measure the seconds that a rank spends in each phase, without waiting for the accelerator."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

#: What a rank does between the phases that have a name.
REST = "rest"


class Timer(Protocol):
    """A clock whose marks are read later."""

    def mark(self) -> Any:
        """Mark the present."""

    def seconds(self, begin: Any, end: Any) -> float | None:
        """Return the seconds between two marks; None as long as they are not known."""


class HostTimer:
    """The host's clock, for a CPU, which has done what it was told before the next line runs."""

    def mark(self) -> float:
        """Read the clock."""
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        """Return the difference."""
        return end - begin


class StreamTimer:
    """Events in an accelerator's stream, which works behind the host.

    Their times are known when the stream has reached them. Until then nothing waits.
    """

    def __init__(self, accelerator: Any):
        """
        Args:
            accelerator: DeepSpeed's.
        """
        self._make_event = accelerator.Event

    def mark(self) -> Any:
        """Put an event into the current stream."""
        event = self._make_event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float | None:
        """Return the difference, which the stream knows in milliseconds."""
        return float(begin.elapsed_time(end)) / 1000 if end.query() else None


class PhaseClock:
    """Adds up the seconds of phases, which follow each other, and of parts of them.

    On an accelerator they are the time of its stream: where the host is late with work for it, the
    stream waits, and that is part of the phase.
    """

    def __init__(self, timer: Timer | None = None):
        """
        Args:
            timer: The host's clock by default.
        """
        self.totals: dict[str, float] = {}
        """Seconds of each phase, and of each part, since the start."""
        self.listener: Callable[[str], None] | None = None
        """Told of each phase that begins, in the thread that trains."""
        self._timer = timer or HostTimer()
        self._phase, self._since = REST, self._timer.mark()
        self._unread: deque[tuple[str, Any, Any]] = deque()
        self._taken: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """End the current phase, and begin another one."""
        now = self._timer.mark()
        self._unread.append((self._phase, self._since, now))
        self._phase, self._since = phase, now
        if self.listener is not None:
            self.listener(phase)

    @contextmanager
    def part(self, name: str, phases: Collection[str]) -> Iterator[None]:
        """Measure a part of the current phase, which counts in both.

        ``gather`` is then the part in all phases, and ``gather in forward`` that in one of them.

        Args:
            phases: Those in which it is measured.
        """
        if self._phase not in phases:
            yield
            return
        own, begin = f"{name} in {self._phase}", self._timer.mark()
        yield
        end = self._timer.mark()
        self._unread += [(name, begin, end), (own, begin, end)]

    def read(self) -> None:
        """Add what has become known to the totals."""
        while self._unread:
            name, begin, end = self._unread[0]
            seconds = self._timer.seconds(begin, end)
            if seconds is None:
                return
            self._unread.popleft()
            self.totals[name] = self.totals.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Return the seconds of each phase and part since the last call, as far as known."""
        self.read()
        new = {name: total - self._taken.get(name, 0.0) for name, total in self.totals.items()}
        self._taken = self.totals.copy()
        return {name: seconds for name, seconds in new.items() if seconds > 0}

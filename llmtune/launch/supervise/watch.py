"""Watch running ranks: forward signals, and end the watch at a failure, a hang or their end."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from llmtune.errors import EXIT_STOPPED
from llmtune.launch.supervise.phase_records import HangDetector
from llmtune.launch.supervise.processes import RankProcess
from llmtune.launch.supervise.signals import StopRequests
from llmtune.process import STOP_SIGNALS

# : Between a first failure and the end of the other ranks: they report a lost connection by
# themselves in about a second.
GRACE_SECONDS = 5.0
# : The same where a rank stopped as it was asked to: others may still be in a collective with it,
# or finish a tracker.
STOP_GRACE_SECONDS = 30.0
POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the supervisor waits."""

    hang_timeout: float = 1800.0
    """Seconds without any sign of progress."""
    stop_timeout: float = 900.0
    """Seconds between a signal and the end of the ranks."""


class EndReason(Enum):
    """Why the watch is over."""

    all_ended = "all ended"
    failure = "one failed and the others had their time"
    stop = "one stopped and the others had their time"
    stop_at_once = "stopped at once"
    stop_timeout = "asked to stop, and did not in time"
    hang = "no rank makes progress"


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchResult:
    """How the ranks stood when the watch was over."""

    cause: EndReason
    codes: list[int | None]
    """Exit codes; None for a rank that still ran."""
    first_failed: int | None
    signals: list[signal.Signals]
    """That the supervisor received; the list grows until the ranks are gone."""

    @property
    def stopped(self) -> bool:
        """Whether a rank ended because it was asked to."""
        return any(is_stop(code, bool(self.signals)) for code in self.codes)


def is_stop(code: int | None, asked: bool) -> bool:
    """Whether this exit code is that of a rank which stopped.

    One that had no handler yet dies of the signal.
    """
    return code == EXIT_STOPPED or (asked and code in [-number for number in STOP_SIGNALS])


class Supervisor:
    """One watch over one set of ranks."""

    def __init__(
        self,
        ranks: Sequence[RankProcess],
        stops: StopRequests,
        hang: HangDetector,
        limits: Limits,
        say: Callable[[str], None],
    ):
        self._ranks = ranks
        self._stops = stops
        self._hang = hang
        self._limits = limits
        self._say = say
        self._codes: list[int | None] = []
        self._first_failed: int | None = None
        self._failed_at: float | None = None
        self._asked_at: float | None = None
        self._stopped_at: float | None = None

    def until_end(self) -> WatchResult:
        """Wait until all ranks have ended, or are to be ended."""
        while (cause := self._look()) is None:
            time.sleep(POLL_SECONDS)
        return WatchResult(
            cause=cause,
            codes=self._codes,
            first_failed=self._first_failed,
            signals=self._stops.received,
        )

    def _look(self) -> EndReason | None:
        self._codes = [rank.exit_code() for rank in self._ranks]
        now = time.monotonic()
        self._note_ends(now)
        if None not in self._codes:
            return EndReason.all_ended
        if self._stops.received and self._asked_at is None:
            self._asked_at = now
            self._hand_on(self._stops.received[0])
        if self._stops.at_once:
            return EndReason.stop_at_once
        if _is_over(self._failed_at, GRACE_SECONDS, now):
            return EndReason.failure
        if _is_over(self._stopped_at, STOP_GRACE_SECONDS, now):
            return EndReason.stop
        if _is_over(self._asked_at, self._limits.stop_timeout, now):
            return EndReason.stop_timeout
        if self._asked_at is None and self._hang.is_hung():
            return EndReason.hang
        return None

    def _note_ends(self, now: float) -> None:
        asked = bool(self._stops.received)
        if self._stopped_at is None and any(is_stop(code, asked) for code in self._codes):
            self._stopped_at = now
        failed = [
            number for number, code in enumerate(self._codes) if code and not is_stop(code, asked)
        ]
        if failed and self._failed_at is None:
            self._failed_at = now
            # Of several since the last look: one that a signal ended, for the others may have lost
            # the connection to it.
            self._first_failed = min(failed, key=lambda number: (self._codes[number] or 0) > 0)

    def _hand_on(self, first: signal.Signals) -> None:
        for rank in self._ranks:
            rank.send(signal.SIGTERM)
        # In `llmtune | tee log`, Ctrl-C has ended tee already; that must not cost the save.
        with contextlib.suppress(OSError, SystemExit):
            self._say(
                f"{first.name}: saving after the current step (Ctrl-C twice ends at once) ..."
            )


def _is_over(since: float | None, seconds: float, now: float) -> bool:
    return since is not None and now - since > seconds

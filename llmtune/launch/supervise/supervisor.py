"""Watch running ranks: pass a signal on, notice failures and hangs, and say why it ended."""

import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from llmtune.errors import EXIT_STOPPED
from llmtune.launch.processes.rank_process import RankProcess
from llmtune.launch.supervise.phase_records import HangDetector
from llmtune.launch.supervise.signals import StopRequests
from llmtune.process import STOP_SIGNALS

#: From a first failure to the kill of the other ranks, which report a lost connection by themselves
#: in about a second.
GRACE_SECONDS = 5.0
#: The same after a rank stopped as it was asked to: others may still be in a collective with it, or
#: finish a tracker.
STOP_GRACE_SECONDS = 30.0
POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Limits:
    """Timeouts of the supervisor."""

    hang_timeout: float = 1800.0
    """Seconds without any sign of progress."""
    stop_timeout: float = 900.0
    """Seconds between a signal and the end of the ranks."""


class EndReason(Enum):
    """The reason for the end of the watch; values are part of messages."""

    all_ended = "all ended"
    failure = "one failed and the grace period of the others is over"
    stop = "one stopped and the grace period of the others is over"
    stop_at_once = "stopped at once"
    stop_timeout = "asked to stop, and did not in time"
    hang = "none makes progress"


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchResult:
    """The state of the ranks when the watch ended."""

    reason: EndReason
    codes: list[int | None]
    """Exit code of each rank; None for a rank that was still running."""
    first_failed: int | None
    signals: list[signal.Signals]
    """Signals that the supervisor received; the list grows until the ranks are gone."""

    @property
    def stopped(self) -> bool:
        """Tell whether a rank ended because it was asked to."""
        return any(is_stop(code, bool(self.signals)) for code in self.codes)


def is_stop(code: int | None, asked: bool) -> bool:
    """Tell whether this is the exit code of a rank that stopped because it was asked to.

    A rank without a handler yet is killed by the signal.
    """
    return code == EXIT_STOPPED or (asked and code in [-number for number in STOP_SIGNALS])


class Supervisor:
    """Watches the ranks of one attempt, in the main thread of the supervising process."""

    def __init__(
        self,
        *,
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
        # Times of the first failure, stop request and stopped rank; None until they happen.
        self._failed_at: float | None = None
        self._asked_at: float | None = None
        self._stopped_at: float | None = None

    def watch(self) -> WatchResult:
        """Wait until all ranks have ended, or until there is a reason to end them."""
        while (reason := self._poll()) is None:
            time.sleep(POLL_SECONDS)
        return WatchResult(
            reason=reason,
            codes=self._codes,
            first_failed=self._first_failed,
            signals=self._stops.received,
        )

    def _poll(self) -> EndReason | None:
        now = time.monotonic()
        self._codes = [rank.exit_code() for rank in self._ranks]
        self._note_ends(now)
        if None not in self._codes:
            return EndReason.all_ended

        # A first signal is passed on to the ranks, once.
        if self._stops.received and self._asked_at is None:
            self._asked_at = now
            self._ask_to_stop(self._stops.received[0])

        # Some ranks are still running: is there a reason to end them?
        if self._stops.at_once:
            return EndReason.stop_at_once
        if _is_over(self._failed_at, GRACE_SECONDS, now):
            return EndReason.failure
        if _is_over(self._stopped_at, STOP_GRACE_SECONDS, now):
            return EndReason.stop
        if _is_over(self._asked_at, self._limits.stop_timeout, now):
            return EndReason.stop_timeout
        # Ranks that were asked to stop have the stop timeout instead.
        if self._asked_at is None and self._hang.is_hung():
            return EndReason.hang
        return None

    def _note_ends(self, now: float) -> None:
        asked = bool(self._stops.received)
        if self._stopped_at is None and any(is_stop(code, asked) for code in self._codes):
            self._stopped_at = now
        failed = [
            rank for rank, code in enumerate(self._codes) if code and not is_stop(code, asked)
        ]
        if failed and self._failed_at is None:
            self._failed_at = now
            # Of several since the last poll, take one that a signal ended: the others may only have
            # lost the connection to it.
            self._first_failed = min(failed, key=lambda rank: (self._codes[rank] or 0) > 0)

    def _ask_to_stop(self, first: signal.Signals) -> None:
        for rank in self._ranks:
            rank.send(signal.SIGTERM)
        # In `llmtune | tee log`, Ctrl-C has ended tee already; that must not cost the save.
        with contextlib.suppress(OSError, SystemExit):
            self._say(
                f"{first.name}: saving after the current step (Ctrl-C twice ends at once) ..."
            )


def _is_over(since: float | None, seconds: float, now: float) -> bool:
    return since is not None and now - since > seconds

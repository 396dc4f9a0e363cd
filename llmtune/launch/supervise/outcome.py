"""What an attempt came to: the one error that says why ranks ended, and whether to start them
again.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

from llmtune.errors import ERRORS_BY_CODE, EXIT_STOPPED, LlmtuneError, StoppedError
from llmtune.launch.supervise.out_of_memory import MemoryEvent, RanOutOfMemoryError
from llmtune.launch.supervise.watch import EndReason, Limits, WatchResult
from llmtune.storage.rank_files import FailureReport

_GO_ON = "The same command goes on from the newest checkpoint."


class RanksFailedError(LlmtuneError):
    """Ranks ended in a way that may not come again: killed, an unexpected exception, a hang,
    numbers gone bad.
    """

    def __init__(
        self,
        message: str,
        reason: str,
        step: int,
        rollback: bool = False,
        at_limit: MemoryEvent | None = None,
    ):
        super().__init__(message)
        self.reason = reason
        """One line."""
        self.step = step
        """The last optimizer step that was done."""
        self.rollback = rollback
        """Whether a rank asked for it."""
        self.at_limit = at_limit
        """Where the rank had nearly all the memory that it may have; a second time, that is taken
        for the reason.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptOutcome:
    """What is known when all ranks are gone."""

    end: WatchResult
    reports: list[FailureReport]
    """What failing ranks said, those with advice first."""
    event: MemoryEvent | None
    """Memory that ran out."""
    at_limit: MemoryEvent | None
    """Memory that may have run out."""
    step: int
    """The last optimizer step that was done."""
    stacks: str
    """Where stack traces are, if they were asked for."""
    log: Path

    def to_error(self, limits: Limits) -> LlmtuneError | None:
        """The error of the attempt; None where all ranks did their work and nobody asked them to
        stop.
        """
        end = self.end
        if end.cause is EndReason.stop_at_once:
            return StoppedError(f"ended at once, without saving. {_GO_ON}")
        known = next(
            (report for report in self.reports if report.known and report.code != EXIT_STOPPED),
            None,
        )
        if known is None and end.stopped:
            return StoppedError(self._stop_message())
        if end.cause is EndReason.stop_timeout:
            return StoppedError(
                f"not saved: the ranks had not ended {limits.stop_timeout:g} s after"
                f" {end.signals[0].name} (launch.stop_timeout) and were killed; {self.stacks}."
                f" {_GO_ON}"
            )
        if not any(end.codes) and end.cause is EndReason.all_ended:
            return (
                StoppedError("stopped; training was done, the same command does the rest")
                if end.signals
                else None
            )
        if self.event is not None and not end.signals:
            return RanOutOfMemoryError(self.event)
        if known is not None and not known.rollback:
            return ERRORS_BY_CODE.get(known.code, LlmtuneError)(known.message)
        failure = self._failure(known, limits)
        if end.signals:
            return StoppedError(
                f"{end.signals[0].name} came, but nothing was saved after it: {failure}"
            )
        return failure

    def _stop_message(self) -> str:
        said = next(
            (report.message for report in self.reports if report.code == EXIT_STOPPED), None
        )
        return (
            said
            or "stopped while the ranks were starting; nothing is lost, the same command starts"
            " again"
        )

    def _failure(self, known: FailureReport | None, limits: Limits) -> RanksFailedError:
        if known is not None:
            return RanksFailedError(
                known.message, _first_line(known.message), self.step, rollback=True
            )
        if self.end.cause is EndReason.hang:
            seconds = (
                f"{limits.hang_timeout:g} s (launch.hang_timeout; ten times as long while ranks"
                " start or answer)"
            )
            reason = f"no rank made progress for {seconds}; {self.stacks}"
            return RanksFailedError(f"{reason}. {_GO_ON}", reason, self.step)
        failed = self.end.first_failed
        assert failed is not None
        report = self._first_report(failed)
        if report is not None:
            text = f"rank {report.rank}: {report.message}"
            message = f"{text}\nMore in {self.log}"
            return RanksFailedError(message, _first_line(text), self.step, at_limit=self.at_limit)
        code = self.end.codes[failed] or 0
        reason = f"rank {failed} ended with " + (
            f"signal {_signal_name(-code)}" if code < 0 else f"exit code {code}"
        )
        if code == -signal.SIGKILL:
            reason += " (killed by another process, not by the kernel's OOM killer)"
        message = f"{reason} and left no message; see {self.log}. {_GO_ON}"
        return RanksFailedError(message, reason, self.step, at_limit=self.at_limit)

    def _first_report(self, failed: int) -> FailureReport | None:
        """What the rank said that failed, or one that spoke before it: the later one may only have
        lost the connection, when both were gone at the supervisor's next look. None where the rank
        said nothing."""
        own = next((report for report in self.reports if report.rank == failed), None)
        if own is None or (self.end.codes[failed] or 0) < 0:
            return own
        earlier = [report for report in self.reports if (self.end.codes[report.rank] or 0) > 0]
        return min(earlier, key=lambda report: report.time, default=own)


def _signal_name(number: int) -> str:
    """Real-time signals have no name of their own."""
    return signal.Signals(number).name if number in set(signal.Signals) else str(number)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else ""

"""The outcome of an attempt: one error that says why the ranks ended, and whether to restart."""

import signal
from dataclasses import dataclass
from pathlib import Path

from llmtune.errors import ERRORS_BY_CODE, EXIT_STOPPED, LlmtuneError, StoppedError
from llmtune.launch.supervise.out_of_memory import MemoryEvent, RanOutOfMemoryError
from llmtune.launch.supervise.supervisor import EndReason, Limits, WatchResult
from llmtune.storage.rank_files import FailureReport

_RUN_AGAIN = "The same command resumes from the newest checkpoint."


class RanksFailedError(LlmtuneError):
    """Ranks failed in a way that a restart may get past.

    They were killed, raised an unexpected exception, hung, or met a loss that is not finite.
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
        """One line on the failure."""
        self.step = step
        """The last optimizer step that was finished."""
        self.rollback = rollback
        """A rank asked to go back to the newest checkpoint."""
        self.at_limit = at_limit
        """The rank was near its memory limit; the second time, that counts as the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptOutcome:
    """All that an attempt left behind, read after its ranks have ended."""

    result: WatchResult
    reports: list[FailureReport]
    """Reports of failed ranks, those with advice first."""
    event: MemoryEvent | None
    """Memory that ran out."""
    at_limit: MemoryEvent | None
    """Memory that may have run out."""
    step: int
    """The last optimizer step that was finished."""
    stacks: str
    """Location of the stack traces, if the ranks were asked for them."""
    log: Path

    def to_error(self, limits: Limits) -> LlmtuneError | None:
        """Return the error of the attempt; None where it finished and nobody asked to stop."""
        result = self.result
        if result.reason is EndReason.stop_at_once:
            return StoppedError(f"ended at once, without saving. {_RUN_AGAIN}")

        # The ranks stopped, finished, or were too slow to stop.
        known = self._find_known_failure()
        if known is None and result.stopped:
            return StoppedError(self._stop_message())
        if result.reason is EndReason.stop_timeout:
            return StoppedError(
                f"not saved: the ranks had not ended {limits.stop_timeout:g} s after"
                f" {result.signals[0].name} (launch.stop_timeout) and were killed; {self.stacks}."
                f" {_RUN_AGAIN}"
            )
        if not any(result.codes) and result.reason is EndReason.all_ended:
            if not result.signals:
                return None
            return StoppedError("stopped; training was done, the same command does the rest")

        # A rank failed: of memory, with an error that advises the user, or otherwise.
        if self.event is not None and not result.signals:
            return RanOutOfMemoryError(self.event)
        if known is not None and not known.rollback:
            return ERRORS_BY_CODE.get(known.code, LlmtuneError)(known.message)
        failure = self._failure(known, limits)
        if result.signals:
            return StoppedError(
                f"{result.signals[0].name} came, but nothing was saved after it: {failure}"
            )
        return failure

    def _find_known_failure(self) -> FailureReport | None:
        """Return the first report of an error with advice for the user."""
        for report in self.reports:
            if report.known and report.code != EXIT_STOPPED:
                return report
        return None

    def _stop_message(self) -> str:
        for report in self.reports:
            if report.code == EXIT_STOPPED and report.message:
                return report.message
        return (
            "stopped while the ranks were starting; nothing is lost, the same command starts again"
        )

    def _failure(self, known: FailureReport | None, limits: Limits) -> RanksFailedError:
        if known is not None:
            return RanksFailedError(
                known.message, _first_line(known.message), self.step, rollback=True
            )
        if self.result.reason is EndReason.hang:
            reason = (
                f"no rank made progress for {limits.hang_timeout:g} s (launch.hang_timeout; ten"
                f" times as long while ranks start or answer); {self.stacks}"
            )
            return RanksFailedError(f"{reason}. {_RUN_AGAIN}", reason, self.step)

        # The first failed rank left a report, or only its exit code.
        failed = self.result.first_failed
        assert failed is not None
        report = self._first_report(failed)
        if report is not None:
            text = f"rank {report.rank}: {report.message}"
            message = f"{text}\nMore in {self.log}"
            return RanksFailedError(message, _first_line(text), self.step, at_limit=self.at_limit)
        code = self.result.codes[failed] or 0
        ending = f"signal {_signal_name(-code)}" if code < 0 else f"exit code {code}"
        reason = f"rank {failed} ended with {ending}"
        if code == -signal.SIGKILL:
            reason += " (killed by another process, not by the kernel's OOM killer)"
        message = f"{reason} and left no message; see {self.log}. {_RUN_AGAIN}"
        return RanksFailedError(message, reason, self.step, at_limit=self.at_limit)

    def _first_report(self, failed: int) -> FailureReport | None:
        """Return the report of the failed rank, or an earlier one of another rank.

        Where both had ended at the supervisor's next poll, the later one may only have lost its
        connection. None where the rank left no report.
        """
        codes = self.result.codes
        own = next((report for report in self.reports if report.rank == failed), None)
        if own is None or (codes[failed] or 0) < 0:
            return own
        earlier = [report for report in self.reports if (codes[report.rank] or 0) > 0]
        return min(earlier, key=lambda report: report.time, default=own)


def _signal_name(number: int) -> str:
    # Real-time signals have no name in Python.
    return signal.Signals(number).name if number in set(signal.Signals) else str(number)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else ""

"""Run the ranks of this machine once: a failing rank ends the others, a signal lets them save, a
hang is noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from llmtune.launch.supervise.log_filter import wait_for_filters
from llmtune.launch.supervise.out_of_memory import event_at_limit, find_event
from llmtune.launch.supervise.outcome import AttemptOutcome
from llmtune.launch.supervise.phase_records import HangDetector, finished_step
from llmtune.launch.supervise.rank_group import RankGroup
from llmtune.launch.supervise.signals import StopRequests, remember_stops
from llmtune.launch.supervise.stacks import save_stacks
from llmtune.launch.supervise.watch import EndReason, Limits, Supervisor, WatchResult
from llmtune.storage.rank_files import FailureReport


def run_ranks(
    command: list[str],
    world_size: int,
    log: Path,
    say: Callable[[str], None],
    limits: Limits | None = None,
    ahead: RankGroup | None = None,
) -> None:
    """Run ``command`` once a rank until all have ended.

    Args:
        command: Arguments behind the Python interpreter.
        log: What messages point to; stack traces are saved beside it.
        say: Prints a line to the user.
        ahead: Ranks that were started ahead and wait; they are told the last argument of
            ``command``.

    Raises:
        RanOutOfMemoryError: Memory ran out in a rank.
        RanksFailedError: Ranks ended in a way that may not come again.
        StoppedError: A signal came, and the ranks ended, as a rule after they saved.
        LlmtuneError: What else the first rank that failed reported.
    """
    limits = limits or Limits()
    printed = log.stat().st_size if log.exists() else 0
    with ExitStack() as stack:
        with remember_stops() as stops:
            group = ahead or RankGroup(command, world_size)
            stack.callback(group.close)
            if ahead is not None:
                ahead.tell(command[-1])
            end, stacks = _run_to_end(group, log.parent, say, limits, stops)
        wait_for_filters(log)
        reports = FailureReport.read_all(group.folder)
        event = find_event(
            end.codes, end.first_failed, reports, group.folder, _read_from(log, printed)
        )
        step = finished_step(group.folder, world_size)
        failed = end.first_failed
        at_limit = (
            event_at_limit(group.folder, failed, "it had nearly all its memory")
            if failed is not None
            else None
        )
        error = AttemptOutcome(
            end=end,
            reports=reports,
            event=event,
            at_limit=at_limit,
            step=step,
            stacks=stacks,
            log=log,
        ).to_error(limits)
    if error is not None:
        raise error


def _run_to_end(
    group: RankGroup,
    run_folder: Path,
    say: Callable[[str], None],
    limits: Limits,
    stops: StopRequests,
) -> tuple[WatchResult, str]:
    """How the ranks ended, and where their stack traces are if that was the question; no process of
    theirs is left.
    """
    ranks, folder = group.ranks, group.folder
    try:
        end = Supervisor(
            ranks, stops, HangDetector(folder, len(ranks), limits.hang_timeout), limits, say
        ).until_end()
        stacks = ""
        if end.cause in (EndReason.hang, EndReason.stop_timeout):
            stacks = save_stacks(
                ranks, folder, run_folder, f"the ranks as they were given up ({end.cause.value})"
            )
    finally:
        group.end()
    return end, stacks


def _read_from(log: Path, start: int) -> str:
    """What was printed since."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")

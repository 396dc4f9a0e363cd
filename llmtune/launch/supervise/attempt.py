"""Run the ranks of this machine once: one failure ends all, and a signal lets them save."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path

from llmtune.launch.processes.log_filter import wait_for_filters
from llmtune.launch.supervise.out_of_memory import event_at_limit, find_event
from llmtune.launch.supervise.outcome import AttemptOutcome
from llmtune.launch.supervise.phase_records import HangDetector, finished_step
from llmtune.launch.supervise.rank_group import RankGroup
from llmtune.launch.supervise.signals import StopRequests, remember_stops
from llmtune.launch.supervise.stacks import save_stacks
from llmtune.launch.supervise.supervisor import EndReason, Limits, Supervisor, WatchResult
from llmtune.storage.rank_files import FailureReport, heard_file

Show = Callable[[Callable[[], str | None]], AbstractContextManager[object]]
"""Makes a context that shows the user, while nothing is written, what a function describes."""


def run_ranks(
    command: list[str],
    world_size: int,
    log: Path,
    say: Callable[[str], None],
    limits: Limits | None = None,
    ahead: RankGroup | None = None,
    show: Show = lambda _: nullcontext(),
) -> None:
    """Run ``command`` once per rank until all ranks have ended.

    Args:
        command: Arguments after the Python interpreter.
        log: The file that messages refer to; stack traces are saved beside it.
        say: Prints a line to the user.
        ahead: Ranks that were started ahead and wait for the last argument of ``command``.
        show: Shows what is being done as long as rank 0 does not.

    Raises:
        RanOutOfMemoryError: Memory ran out in a rank.
        RanksFailedError: Ranks failed in a way that a restart may get past.
        StoppedError: A signal came, and the ranks ended, usually after they saved.
        LlmtuneError: Any other error that the first failed rank reported.
    """
    limits = limits or Limits()
    printed_before = log.stat().st_size if log.exists() else 0
    with ExitStack() as stack:
        # Signals are remembered as long as a process or a report of the ranks is left.
        with remember_stops() as stops:
            group = ahead or RankGroup(command, world_size)
            stack.callback(group.close)
            stack.enter_context(show(partial(describe_ranks, group)))
            if ahead is not None:
                ahead.tell(command[-1])
            result, stacks = _watch_to_end(group, log.parent, say, limits, stops)

        # All ranks have ended: read what they left behind.
        wait_for_filters(log)
        outcome = _read_outcome(group, result, stacks, log, printed_before)
    error = outcome.to_error(limits)
    if error is not None:
        raise error


def describe_ranks(group: RankGroup) -> str | None:
    """Describe what is being done as long as rank 0 says nothing of it: before and after it ran."""
    if not heard_file(group.folder).exists():
        return "starting the ranks"
    try:
        has_ended = group.ranks[0].exit_code() is not None
    except ChildProcessError:
        # Waited for by the other thread in this moment.
        has_ended = True
    return "waiting for all ranks to end" if has_ended else None


def _watch_to_end(
    group: RankGroup,
    run_folder: Path,
    say: Callable[[str], None],
    limits: Limits,
    stops: StopRequests,
) -> tuple[WatchResult, str]:
    """Watch the ranks and end what is left of them.

    Returns:
        The result, and where the ranks' stack traces are if they hung.
    """
    ranks, folder = group.ranks, group.folder
    try:
        result = Supervisor(
            ranks=ranks,
            stops=stops,
            hang=HangDetector(folder, len(ranks), limits.hang_timeout),
            limits=limits,
            say=say,
        ).watch()
        stacks = ""
        if result.reason in (EndReason.hang, EndReason.stop_timeout):
            why = f"stacks of the ranks before they were killed ({result.reason.value})"
            stacks = save_stacks(ranks, folder, run_folder, why)
    finally:
        group.end()
    return result, stacks


def _read_outcome(
    group: RankGroup, result: WatchResult, stacks: str, log: Path, printed_before: int
) -> AttemptOutcome:
    folder, failed = group.folder, result.first_failed
    reports = FailureReport.read_all(folder)
    at_limit = None
    if failed is not None:
        at_limit = event_at_limit(folder, failed, "it had nearly all its memory")
    output = _read_from(log, printed_before)
    return AttemptOutcome(
        result=result,
        reports=reports,
        event=find_event(result.codes, failed, reports, folder, output),
        at_limit=at_limit,
        step=finished_step(folder, len(group.ranks)),
        stacks=stacks,
        log=log,
    )


def _read_from(log: Path, start: int) -> str:
    """Read what was printed to the log after its first ``start`` bytes."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")

"""Run the ranks of this machine once: a failing rank ends the others, a signal lets them save, a hang is noticed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from llmtune.launch.environment import free_port, rank_environment, remove_shared_buffers
from llmtune.launch.log_filter import wait_for_filters
from llmtune.launch.out_of_memory import find_event, note_kills
from llmtune.launch.outcome import Aftermath, read_reports
from llmtune.launch.processes import RankProcess, end_ranks
from llmtune.launch.progress import HangWatch, finished_step
from llmtune.launch.signals import remember_stops
from llmtune.launch.stacks import save_stacks
from llmtune.launch.watch import Cause, End, Limits, Watch


def run_ranks(
    command: list[str], world_size: int, log: Path, say: Callable[[str], None], limits: Limits | None = None
) -> None:
    """Run ``command`` once a rank until all have ended.

    Args:
        command: Arguments behind the Python interpreter.
        log: What messages point to; stack traces are saved beside it.
        say: Prints a line to the user.

    Raises:
        RanOutOfMemoryError: Memory ran out in a rank.
        RanksFailedError: Ranks ended in a way that may not come again.
        StoppedError: A signal came, and the ranks ended, as a rule after they saved.
        LlmtuneError: What else the first rank that failed reported.
    """
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="llmtune-") as temporary:
        folder = Path(temporary)
        note_kills(folder)
        printed = log.stat().st_size if log.exists() else 0
        end, stacks = _run_to_end(command, world_size, folder, log.parent, say, limits)
        wait_for_filters(log)
        reports = read_reports(folder)
        event = find_event(end.codes, end.first_failed, reports, folder, _read_from(log, printed))
        step = finished_step(folder, world_size)
        error = Aftermath(end, reports, event, step, stacks, log).to_error(limits)
    if error is not None:
        raise error


def _run_to_end(
    command: list[str], world_size: int, folder: Path, run_folder: Path, say: Callable[[str], None], limits: Limits
) -> tuple[End, str]:
    """How the ranks ended, and where their stack traces are if that was the question; no process of theirs is left."""
    port = free_port()
    ranks: list[RankProcess] = []
    with remember_stops() as stops:
        try:
            for number in range(world_size):
                ranks.append(RankProcess(number, command, rank_environment(number, world_size, port, folder)))
            end = Watch(ranks, stops, HangWatch(folder, world_size, limits.hang_timeout), limits, say).until_end()
            stacks = ""
            if end.cause in (Cause.hang, Cause.stop_timeout):
                stacks = save_stacks(ranks, folder, run_folder, f"the ranks as they were given up ({end.cause.value})")
        finally:
            end_ranks(ranks)
            remove_shared_buffers(port)
    return end, stacks


def _read_from(log: Path, start: int) -> str:
    """What was printed since."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")

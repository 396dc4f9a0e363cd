"""Start the ranks of this machine and watch them: a failing rank ends the others, a signal lets them save."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from llmtune.errors import ERRORS_BY_CODE, EXIT_STOPPED, LlmtuneError, StoppedError
from llmtune.launch.environment import free_port, rank_environment, remove_shared_buffers
from llmtune.launch.out_of_memory import RanOutOfMemoryError, find_event, note_kills

#: Between a first failure and the end of the other ranks: they report a lost connection by themselves in about a second.
GRACE_SECONDS = 5.0
POLL_SECONDS = 0.05


@dataclass(slots=True)
class _Signals:
    """Signals that the supervisor received, to be handed on."""

    received: int = 0
    last: int = 0

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """A signal handler that only remembers."""
        self.received += 1
        self.last = number


def run_ranks(command: list[str], world_size: int, log: Path, say: Callable[[str], None]) -> None:
    """Run ``command`` once a rank until all have ended.

    Args:
        command: Arguments behind the Python interpreter.
        log: What messages point to.
        say: Prints a line to the user.

    Raises:
        RanOutOfMemoryError: Memory ran out in a rank.
        LlmtuneError: What the first rank that failed reported.
        StoppedError: A signal came, and all ranks saved and ended.
    """
    with tempfile.TemporaryDirectory(prefix="llmtune-") as folder:
        signals = _Signals()
        note_kills(Path(folder))
        printed = log.stat().st_size if log.exists() else 0
        previous = {number: signal.signal(number, signals.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        port = free_port()
        ranks = _start(command, world_size, port, Path(folder))
        first_failed: int | None = None
        try:
            first_failed = _watch(ranks, signals, say)
        finally:
            _end(ranks)
            remove_shared_buffers(port)
            for number, handler in previous.items():
                signal.signal(number, handler)
        codes = [rank.returncode for rank in ranks]
        if any(codes):
            if (
                signals.received
                and all(code in (0, EXIT_STOPPED, -signal.SIGTERM) for code in codes)
                and -signal.SIGTERM in codes
            ):
                raise StoppedError(
                    "stopped while the ranks were starting; nothing is lost, the same command starts again"
                )
            reports = _read_reports(Path(folder))
            event = find_event(codes, first_failed, reports, Path(folder), _read_from(log, printed))
            if event is not None and not signals.received:
                raise RanOutOfMemoryError(event)
            raise _failure(codes, first_failed, reports, log)


def _start(command: list[str], world_size: int, port: int, failure_dir: Path) -> list[subprocess.Popen[bytes]]:
    ranks: list[subprocess.Popen[bytes]] = []
    for rank in range(world_size):
        environment = rank_environment(rank, world_size, port, failure_dir)
        # A session of its own: Ctrl-C reaches the supervisor alone, which then asks the ranks to save.
        ranks.append(subprocess.Popen([sys.executable, *command], env=environment, start_new_session=True))
    return ranks


def _watch(ranks: list[subprocess.Popen[bytes]], signals: _Signals, say: Callable[[str], None]) -> int | None:
    """Until all ranks have ended, or one has failed and the others had their time; the rank that failed first."""
    handed_on = 0
    first_failed: int | None = None
    failed_at = 0.0
    while any(rank.poll() is None for rank in ranks):
        time.sleep(POLL_SECONDS)
        if signals.received > handed_on:
            handed_on = signals.received
            if handed_on > 1:
                return first_failed
            say(f"{signal.Signals(signals.last).name}: saving after the current step (a second one ends at once) ...")
            for rank in ranks:
                if rank.poll() is None:
                    rank.send_signal(signal.SIGTERM)
        if first_failed is None:
            first_failed = next((n for n, rank in enumerate(ranks) if rank.poll() not in (None, 0, EXIT_STOPPED)), None)
            failed_at = time.monotonic()
        if first_failed is not None and time.monotonic() - failed_at > GRACE_SECONDS:
            break
    return first_failed


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            try:
                os.killpg(rank.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    for rank in ranks:
        rank.wait()


def _read_from(log: Path, start: int) -> str:
    """What was printed since."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def _read_reports(folder: Path) -> list[dict[str, Any]]:
    """What failing ranks said: those with advice first, then by time."""
    reports = [json.loads(file.read_text()) for file in folder.glob("rank-*.json")]
    return sorted(reports, key=lambda report: (not report["known"], report["time"]))


def _failure(
    codes: list[int | None], first_failed: int | None, reports: list[dict[str, Any]], log: Path
) -> LlmtuneError:
    """The error of the run: a report with advice, or what can be said of the rank that failed first."""
    if all(code in (0, EXIT_STOPPED) for code in codes):
        return StoppedError(reports[0]["message"] if reports else "stopped")
    if reports:
        report = reports[0]
        error = ERRORS_BY_CODE.get(report["code"], LlmtuneError)
        text = report["message"] if report["known"] else f"rank {report['rank']}: {report['message']}\nMore in {log}"
        return error(text)
    # A loop that ended between two looks at the ranks has no first one.
    others = (rank for rank, code in enumerate(codes) if code not in (0, EXIT_STOPPED))
    killed = first_failed if first_failed is not None else next(others, 0)
    code = codes[killed] or 0
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    hint = " (somebody ended it; the kernel did not for want of memory)" if code == -signal.SIGKILL else ""
    return LlmtuneError(
        f"rank {killed} ended with {how}{hint} and left no message; see {log}. "
        "The same command goes on from the newest checkpoint."
    )

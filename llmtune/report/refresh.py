"""Keep ``report.html`` of a run up to date, in processes beside it; a run never waits or fails."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from llmtune.report.script import describe_missing, find_missing
from llmtune.storage import layout
from llmtune.track.tracker import Outcome, Record

#: Least seconds between two reports, and seconds after which one is due without an evaluation.
LEAST_SECONDS, MOST_SECONDS = 60.0, 300.0
#: Seconds that the last report may take: the user waits for it, after a stop also a scheduler.
LAST_SECONDS, LAST_SECONDS_AFTER_STOP = 120.0, 20.0
_MODULE = "llmtune.report.program"


class ReportRefresher:
    """A tracker that has the report written after evaluations and saves, at most once a minute.

    A record costs the training thread a look at its keys. A thread starts one process at a time.
    """

    def __init__(
        self,
        run: Path,
        cache: Path,
        say: Callable[[str], None],
        least_seconds: float = LEAST_SECONDS,
    ):
        """
        Args:
            cache: The folder of :func:`llmtune.config.cache_folder.find_cache`.
            say: Shows a line to the user; called from both threads.
        """
        self._command = _command(run, cache)
        self._say = say
        self._least_seconds = least_seconds
        self._due, self._has_ended = threading.Event(), threading.Event()
        self._asked_at = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="report", daemon=True)
        if missing := find_missing():
            say(describe_missing(missing))
        else:
            self._thread.start()

    def log(self, record: Record) -> None:
        """Ask for a report where the record is worth one."""
        now = time.monotonic()
        is_new = "eval_loss" in record or "save_pause_seconds" in record
        if is_new or now - self._asked_at > MOST_SECONDS:
            self._asked_at = now
            self._due.set()

    def finish(self, _outcome: Outcome) -> None:
        """End; the last report is written when the ranks have ended."""
        self._has_ended.set()
        self._due.set()

    def _work(self) -> None:
        while True:
            self._due.wait()
            self._due.clear()
            if self._has_ended.is_set():
                return
            problem = self._write()
            if problem is not None:
                self._say(f"{layout.REPORT} cannot be refreshed, and is not tried again: {problem}")
                return
            if self._has_ended.wait(self._least_seconds):
                return

    def _write(self) -> str | None:
        """Run one process; return what is wrong."""
        try:
            process = _start(self._command)
        except OSError as error:
            return str(error)
        while process.poll() is None:
            if self._has_ended.wait(0.2):
                process.kill()
                process.communicate()
                return None
        _, output = process.communicate()
        return None if process.returncode == 0 else _last_line(output)


def write_report_now(run: Path, cache: Path, timeout_seconds: float = LAST_SECONDS) -> None:
    """Write the report as it is now, before anybody reads it; a failure leaves the old one."""
    if find_missing():
        return
    try:
        process = _start(_command(run, cache))
    except OSError:
        return
    try:
        process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def write_last_report(
    run: Path, cache: Path, say: Callable[[str], None], timeout_seconds: float
) -> None:
    """Write the report of a run whose ranks have ended, and tell the user where it is, or why not.

    Args:
        cache: The folder of :func:`llmtune.config.cache_folder.find_cache`.
    """
    if missing := find_missing():
        say(describe_missing(missing))
        return
    try:
        process = _start([*_command(run, cache), "--ended"])
    except OSError as error:
        say(f"{layout.REPORT} cannot be written: {error}")
        return
    try:
        _, output = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        say(
            f"{layout.REPORT} was not written within {timeout_seconds:.0f} s; python -m llmtune"
            f" report {run} writes it"
        )
    except KeyboardInterrupt:
        # The run has ended, and its user does not want to wait for this.
        pass
    else:
        if process.returncode == 0:
            say(f"report:       {run / layout.REPORT}")
        else:
            say(f"{layout.REPORT} cannot be written: {_last_line(output)}")
    finally:
        with contextlib.suppress(OSError):
            process.kill()
        process.communicate()


def _command(run: Path, cache: Path) -> list[str]:
    return [sys.executable, "-m", _MODULE, str(run), str(cache)]


def _start(command: list[str]) -> subprocess.Popen[str]:
    """Start the program, which ends with this thread."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def _last_line(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1] if lines else "its process was killed"

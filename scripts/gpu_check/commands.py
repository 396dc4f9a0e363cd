"""Commands in sessions of their own, each with a deadline; nothing that was started here outlives
:meth:`Commands.end_all`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]

#: What a launcher around this program may have left in the environment.
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL_SECONDS = 0.02
_TAIL_CHARACTERS = 1500


class RunFailedError(Exception):
    """A command ended as it should not, or not in time."""


class Clock:
    """How much time there is."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, negative when they are over."""
        return self._end - time.monotonic()


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished command."""

    code: int
    out: str
    err: str

    def check(self) -> Finished:
        """Raises :class:`RunFailedError` with the end of what it printed, unless it ended well."""
        if self.code != 0:
            raise RunFailedError(
                f"exit code {self.code}: {(self.err or self.out).strip()[-_TAIL_CHARACTERS:]}"
            )
        return self


class Commands:
    """Starts ``python -m llmtune`` as a user does; from several threads, if need be."""

    def __init__(self, folder: Path):
        """
        Args:
            folder: For what the commands print.
        """
        self._folder = folder
        self._live: dict[int, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._count = 0

    def llmtune(
        self,
        *arguments: str,
        clock: Clock,
        watch: Callable[[subprocess.Popen[bytes]], None] | None = None,
        environment: dict[str, str] | None = None,
    ) -> Finished:
        """Run it to its end.

        Args:
            watch: Called again and again while it runs.

        Raises:
            RunFailedError: It did not end in time, and was killed with all that it had started.
        """
        with self._lock:
            self._count += 1
            out, err = (self._folder / f"console-{self._count}.{name}" for name in ("out", "err"))
        with out.open("wb") as out_file, err.open("wb") as err_file:
            process = self._start(
                [sys.executable, "-m", "llmtune", *arguments], environment, out_file, err_file
            )
            try:
                while not has_ended(process) and clock.left > 0:
                    if watch is not None:
                        watch(process)
                    time.sleep(_POLL_SECONDS)
                timed_out = not has_ended(process)
            finally:
                self._end(process)
        said = Finished(
            process.returncode, out.read_text(errors="replace"), err.read_text(errors="replace")
        )
        if self._closed:
            raise RunFailedError("the checks were interrupted")
        if timed_out:
            tail = (said.out + said.err).strip()[-_TAIL_CHARACTERS:]
            raise RunFailedError(
                f"no end within {clock.seconds:g} s, so that it was killed; its last words: {tail}"
            )
        return said

    def end_all(self) -> None:
        """Kill what runs, and start nothing any more."""
        with self._lock:
            self._closed = True
            for process in self._live.values():
                kill_group(process)

    def _start(
        self, command: list[str], environment: dict[str, str] | None, out: object, err: object
    ) -> subprocess.Popen[bytes]:
        variables = {
            name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES
        }
        with self._lock:
            if self._closed:
                raise RunFailedError("the checks were interrupted")
            process: subprocess.Popen[bytes] = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**variables, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,  # type: ignore[call-overload]
                stderr=err,
                start_new_session=True,
            )
            self._live[process.pid] = process
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """End whatever is left of it, also of its group where it has ended itself."""
        with self._lock:
            kill_group(process)
            process.wait()
            del self._live[process.pid]


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has; it stays a zombie, so that its number, which is its group's too, is given to
    nobody else.
    """
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a command that was not waited for yet, its group, and its ranks, which lead sessions of
    their own.
    """
    family = descendants(process.pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.kill()


def descendants(pid: int) -> list[psutil.Process]:
    """Children of a process, and theirs."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []

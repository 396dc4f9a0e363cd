"""The processes of the ranks: started, looked at, and ended with everything that they started
themselves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmtune.errors import EXIT_UNEXPECTED
from llmtune.process import die_with_parent

#: The supervisor's process id, for its ranks.
SUPERVISOR = "LLMTUNE_SUPERVISOR"

_END_SECONDS = 60.0


class RankProcess:
    """One rank, the leader of a process group that its own children are in."""

    def __init__(
        self,
        number: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        waits: bool = False,
    ):
        """
        Args:
            waits: It is started ahead and reads from its standard input what to do; see
                :meth:`tell`.
        """
        self.number = number
        # A session of its own: Ctrl-C reaches the supervisor alone, which then asks the ranks to
        # save.
        self._process = subprocess.Popen(
            [sys.executable, *command],
            env={**environment, SUPERVISOR: str(os.getpid())},
            start_new_session=True,
            stdin=subprocess.PIPE if waits else None,
        )

    @property
    def pid(self) -> int:
        """The process id, which is the group's too; nobody else's until :meth:`wait`."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """As ``Popen`` gives it, None while it runs.

        The process stays a zombie, so that its group keeps its number.
        """
        if self._process.returncode is not None:
            return self._process.returncode
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def tell(self, line: str) -> None:
        """What to do, to a rank that waits.

        One that has ended meanwhile is noticed by whoever watches it.
        """
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(OSError), pipe:
            pipe.write(f"{line}\n".encode())

    def send(self, number: signal.Signals) -> None:
        """Signal the rank itself, not its children."""
        if self._process.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill what is left of the group; the rank may have ended by itself and its children
        not.
        """
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        """Until it is gone.

        SIGKILL works at once, except on a process that waits for a file system or a driver.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)


def end_ranks(ranks: Sequence[RankProcess]) -> None:
    """Kill all ranks and their children, and wait until they are gone."""
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.wait()


def follow_launcher() -> None:
    """Called by a rank of a launcher that stays: end with it, also with one that ended before this
    call.

    Nobody tells a process that its parent has gone before it asks, only that another has adopted
    it.
    """
    die_with_parent()
    parent = os.getppid()
    if not may_be_launcher(parent):
        message = (
            f"the launcher of this rank has ended (process {parent} is no launcher): ending too"
        )
        os.write(2, f"{message}\n".encode())
        os._exit(EXIT_UNEXPECTED)


def may_be_launcher(pid: int) -> bool:
    """Whether a process can have started a rank: a Python program, or what it put in between, which
    has its variables.

    What adopts orphans (``init``, ``systemd``, ``tini``, a shell) is neither.
    """
    folder = Path(f"/proc/{pid}")
    try:
        if "python" in (folder / "exe").readlink().name:
            return True
        return b"\0LOCAL_RANK=" in b"\0" + (folder / "environ").read_bytes()
    except OSError:
        # Somebody else's, or in another container. Nobody's ranks are started by another user's
        # first process.
        return pid != 1


def die_with_supervisor() -> None:
    """Called by a rank first of all: end with the supervisor, also with one that ended before this
    call.
    """
    die_with_parent()
    parent = os.getppid()
    if int(os.environ.get(SUPERVISOR, parent)) != parent:
        os._exit(EXIT_UNEXPECTED)

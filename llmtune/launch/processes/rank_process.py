"""Start, poll and kill the processes of ranks, together with the processes that they started."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

#: Environment variable that tells ranks the supervisor's process id.
SUPERVISOR = "LLMTUNE_SUPERVISOR"

_END_SECONDS = 60.0


class RankProcess:
    """The process of one rank, the leader of a process group with its own children."""

    def __init__(
        self,
        number: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        waits: bool = False,
    ):
        """
        Args:
            waits: The rank is started ahead and reads from its standard input what to do; see
                :meth:`tell`.
        """
        self.number = number
        # Its own session: Ctrl-C reaches the supervisor alone, which then asks the ranks to save.
        self._process = subprocess.Popen(
            [sys.executable, *command],
            env={**environment, SUPERVISOR: str(os.getpid())},
            start_new_session=True,
            stdin=subprocess.PIPE if waits else None,
        )

    @property
    def pid(self) -> int:
        """The process id, also that of the group; not reused before :meth:`wait` returns."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """Return the exit code as ``Popen`` does, None while the rank runs.

        The process stays a zombie, so that the id of its group is not reused.
        """
        if self._process.returncode is not None:
            return self._process.returncode
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def tell(self, line: str) -> None:
        """Tell a waiting rank what to do.

        If it has ended meanwhile, the supervisor notices.
        """
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(OSError), pipe:
            pipe.write(f"{line}\n".encode())

    def send(self, sent: signal.Signals) -> None:
        """Signal the rank itself, not its children."""
        if self._process.returncode is None:
            os.kill(self.pid, sent)

    def kill(self) -> None:
        """Kill what is left of the group: children may outlive a rank that ended by itself."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        """Wait until the process is gone.

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

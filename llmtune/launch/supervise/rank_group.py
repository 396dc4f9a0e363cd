"""The ranks of one attempt: their processes, the folder of their reports, and a reserved port."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llmtune.launch.launchers.environment import hold_port, rank_environment, remove_shared_buffers
from llmtune.launch.processes.rank_process import RankProcess, end_ranks
from llmtune.launch.supervise.out_of_memory import count_kills


class RankGroup:
    """The ranks of one attempt, started by the constructor.

    :meth:`end` leaves no process behind, :meth:`close` no file.
    """

    def __init__(self, command: Sequence[str], world_size: int, ahead: bool = False):
        """
        Args:
            command: Arguments behind the Python interpreter.
            ahead: The request is not known yet: the ranks do their slow imports, and wait for
                :meth:`tell`.
        """
        self.ranks: list[RankProcess] = []
        self.waits = ahead
        # No process listens on the port while it is held, and no other run gets it. It also names
        # the shared memory of DeepSpeed's collectives.
        self._held = hold_port()
        self._port = int(self._held.getsockname()[1])
        self.folder = Path(tempfile.mkdtemp(prefix="llmtune-"))
        try:
            count_kills().write(self.folder)
            for rank in range(world_size):
                environment = rank_environment(rank, world_size, self._port, self.folder)
                self.ranks.append(RankProcess(rank, command, environment, ahead))
        except BaseException:
            self.close()
            raise

    def tell(self, request_file: str) -> None:
        """Send the port and the request to ranks that wait."""
        self.waits = False
        for rank in self.ranks:
            rank.tell(f"{self._port} {request_file}")

    def end(self) -> None:
        """Kill the ranks that still run, and wait until they are gone."""
        end_ranks(self.ranks)
        remove_shared_buffers(self._port)
        self._held.close()

    def close(self) -> None:
        """End the ranks, and remove the folder with their reports."""
        self.end()
        shutil.rmtree(self.folder, ignore_errors=True)

"""The ranks of one attempt: their processes, the folder of their files, and a port of their own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llmtune.launch.launchers.environment import hold_port, rank_environment, remove_shared_buffers
from llmtune.launch.supervise.out_of_memory import count_kills
from llmtune.launch.supervise.processes import RankProcess, end_ranks


class RankGroup:
    """Started when it is made. :meth:`end` leaves no process, :meth:`close` no file."""

    def __init__(self, command: Sequence[str], world_size: int, ahead: bool = False):
        """
        Args:
            command: Arguments behind the Python interpreter.
            ahead: Their work is not known yet: they import what takes seconds, and wait to be told
                the rest.
        """
        self.ranks: list[RankProcess] = []
        self.waits = ahead
        # Nobody listens on it. It names the shared memory of DeepSpeed's collectives, and no other
        # run is given it meanwhile.
        self._held = hold_port()
        self._port = int(self._held.getsockname()[1])
        self.folder = Path(tempfile.mkdtemp(prefix="llmtune-"))
        try:
            count_kills().write(self.folder)
            for number in range(world_size):
                environment = rank_environment(number, world_size, self._port, self.folder)
                self.ranks.append(RankProcess(number, command, environment, ahead))
        except BaseException:
            self.close()
            raise

    def tell(self, request_file: str) -> None:
        """What to do, and the port, to ranks that wait."""
        self.waits = False
        for rank in self.ranks:
            rank.tell(f"{self._port} {request_file}")

    def end(self) -> None:
        """Kill what still runs, and wait until it is gone."""
        end_ranks(self.ranks)
        remove_shared_buffers(self._port)
        self._held.close()

    def close(self) -> None:
        """End, and remove the folder with the reports."""
        self.end()
        shutil.rmtree(self.folder, ignore_errors=True)

"""End a rank of a foreign launcher that hangs: no supervisor of llmtune watches it."""

import faulthandler
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from llmtune.errors import EXIT_UNEXPECTED
from llmtune.launch.supervise.phase_records import HangDetector
from llmtune.storage.rank_files import phase_file, read_phase

_POLL_SECONDS = 0.5
#: Time to write the stacks, after which the rank ends without them: with the network, the file
#: system of the run folder may be gone too.
_WRITE_SECONDS = 15.0


class RankWatchdog:
    """Ends this process when its own phase record no longer changes.

    Without it, a rank whose peer's node or network is gone waits for the timeout of the process
    group. The check runs in a thread of the rank.
    """

    def __init__(self, rank: int, run_folder: Path, say: Callable[[str], None]):
        self._rank = rank
        self._run = run_folder
        self._say = say
        self._folder = Path(tempfile.mkdtemp(prefix="llmtune-"))
        self._over = threading.Event()

    @property
    def record(self) -> Path:
        """File that the rank's phase log writes."""
        return phase_file(self._folder, 0)

    def remove(self) -> None:
        """Remove the record."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def watch(self, timeout_seconds: float) -> Iterator[None]:
        """In the block, end the process after so many seconds without a change of its record.

        The limit is ten times as long while the rank starts or answers.
        """
        thread = threading.Thread(
            target=self._poll, args=(timeout_seconds,), name="rank-watchdog", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _poll(self, timeout_seconds: float) -> None:
        detector = HangDetector(self._folder, 1, timeout_seconds)
        while not self._over.wait(min(_POLL_SECONDS, timeout_seconds / 4)):
            if detector.is_hung():
                self._end(timeout_seconds)

    def _end(self, timeout_seconds: float) -> None:
        # The file system may be gone too: the process ends in any case.
        late = threading.Timer(_WRITE_SECONDS, os._exit, (EXIT_UNEXPECTED,))
        late.daemon = True
        late.start()
        record = read_phase(self._folder, 0)
        where = f"rank {self._rank} on {socket.gethostname()} ({record.phase}, step {record.step})"
        why = (
            f"{where} made no progress for {timeout_seconds:g} s (launch.hang_timeout; ten times"
            " that while it starts or answers)"
        )
        try:
            saved = f"its stacks are in {self._write_stacks(why)}"
        except OSError as error:
            saved = f"its stacks could not be saved ({error.strerror})"
        self._say(
            f"{why}: another rank, its node or the network may be gone; {saved}; this rank ends,"
            " so that the launcher can end the others"
        )
        self.remove()
        os._exit(EXIT_UNEXPECTED)

    def _write_stacks(self, why: str) -> Path:
        file = self._run / f"stacks-rank{self._rank}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.txt"
        with file.open("w") as out:
            out.write(why + "\n\n")
            out.flush()
            faulthandler.dump_traceback(out, all_threads=True)
        return file

#!/opt/venv/bin/python
"""torchrun as the program of a container: signals reach the ranks, and their exit code comes back.

    node.py --nnodes=2 --node_rank=0 --master_addr=... --module llmtune ...     as torchrun

torchrun itself kills ranks 30 s after a SIGTERM, which is too early for a large checkpoint, and
ends with 1 whatever a rank ended with. A cluster has to know: 75 means that the state was saved and
the same command goes on, 2 to 7 that it would fail again.

``RETRY_EXIT_CODE=N`` makes N of all codes after which a new start may help. Kubeflow's restart
policy ``ExitCode`` retries codes from 128 on alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

#: llmtune's exit codes (llmtune/errors.py): stopped and saved, and what a user has to change.
STOPPED = 75
USER_ERRORS = range(2, 8)
#: Names of pods are known some seconds after their start.
NAME_SECONDS = 300.0
#: The first argument of the process in which torchrun itself runs.
_INSIDE = "--inside-torchrun"
_ADDRESS = "--master_addr="


def wait_for_name(arguments: Sequence[str], seconds: float = NAME_SECONDS) -> None:
    """Wait until the name of rank 0's pod is known; torchrun reports what is still wrong then."""
    given = [text.removeprefix(_ADDRESS) for text in arguments if text.startswith(_ADDRESS)]
    name = given[-1] if given else os.environ.get("PET_MASTER_ADDR", "")
    deadline = time.monotonic() + seconds
    while name and time.monotonic() < deadline:
        try:
            socket.getaddrinfo(name, None)
        except OSError:
            time.sleep(1.0)
        else:
            return


def find_children(parent: int) -> list[int]:
    """Return the processes that a process has started."""
    found: list[int] = []
    for file in Path(f"/proc/{parent}/task").glob("*/children"):
        # A thread may have ended meanwhile.
        with contextlib.suppress(OSError):
            found += map(int, file.read_text().split())
    return found


def decide_code(code: int, asked: bool, retry_code: int | None) -> int:
    """Return the exit code of the container.

    Args:
        code: That of torchrun's process, negative where a signal ended it.
        asked: The container was asked to stop.
        retry_code: Replaces every code after which a new start may help.
    """
    code = 128 - code if code < 0 else code
    if asked and code in (128 + signal.SIGTERM, 128 + signal.SIGUSR1):
        # Asked before there was anything to save.
        code = STOPPED
    if retry_code is not None and code != 0 and code not in USER_ERRORS:
        return retry_code
    return code


def run_inside(arguments: Sequence[str]) -> int:
    """Run torchrun in this process, and return the exit code of the rank that failed first."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(list(arguments))
    except ChildFailedError as error:
        sys.stderr.write(f"{error}\n")
        code = error.get_first_failure()[1].exitcode
        return 128 - code if code < 0 else code
    return 0


def main(arguments: list[str]) -> int:
    """Start torchrun and hand signals on to its ranks."""
    if arguments[:1] == [_INSIDE]:
        return run_inside(arguments[1:])
    child: subprocess.Popen[bytes] | None = None
    asked = False

    def hand_on(number: int, _frame: object) -> None:
        nonlocal asked
        asked = True
        if child is None:
            sys.exit(STOPPED)
        # SIGTERM and SIGUSR1 mean the same to a rank: save and stop.
        for process in find_children(child.pid) or [child.pid]:
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, hand_on)
    wait_for_name(arguments)
    # A session of its own: the signal of a terminal comes by hand_on alone.
    command = [sys.executable, __file__, _INSIDE, *arguments]
    child = subprocess.Popen(command, start_new_session=True)
    code = child.wait()
    retry = os.environ.get("RETRY_EXIT_CODE")
    return decide_code(code, asked, int(retry) if retry else None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

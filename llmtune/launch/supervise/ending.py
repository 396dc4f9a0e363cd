"""End this process and everything it started, however deep, when it was asked to and does not get
to its end by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from multiprocessing import resource_tracker
from typing import Any, NoReturn

import psutil

# : ``prctl`` option of Linux: orphans among the descendants become children of this process, and
# not of ``init``.
_PR_SET_CHILD_SUBREAPER = 36

# : SIGKILL works at once, except on a process that waits for a file system or a driver; those end
# without us.
_KILL_SECONDS = 2.0


def adopt_orphans() -> None:
    """From here on, :func:`end_descendants` also finds a process whose own parent has ended."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_descendants() -> None:
    """Kill every process below this one, in whatever group or session, and wait until they are
    gone.

    Not so Python's resource tracker: it ends with those who use it, and removes their semaphores.
    """
    tracker: Any = resource_tracker
    spared = tracker._resource_tracker._pid
    deadline = time.monotonic() + _KILL_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.Error):
            left = [
                child for child in psutil.Process().children(recursive=True) if child.pid != spared
            ]
            if not left:
                return
            # Deepest first: one whose parent is gone says so at length before it ends.
            for child in reversed(left):
                with contextlib.suppress(psutil.Error):
                    child.kill()
            psutil.wait_procs(left, timeout=max(0.0, deadline - time.monotonic()))


def end_now(code: int, message: str = "") -> NoReturn:
    """Say so on standard error, and end without the clean-up of libraries, which may wait for what
    was cut off.
    """
    with contextlib.suppress(OSError):
        if message:
            os.write(2, f"{message}\n".encode())
    adopt_orphans()
    end_descendants()
    os._exit(code)

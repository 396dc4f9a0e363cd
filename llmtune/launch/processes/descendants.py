"""End this process and all its descendants when it was asked to stop and does not."""

import contextlib
import ctypes
import os
import time
from multiprocessing import resource_tracker
from typing import Any, NoReturn

import psutil

#: ``prctl`` option of Linux: orphans among the descendants become children of this process, and not
#: of ``init``.
_PR_SET_CHILD_SUBREAPER = 36

#: SIGKILL works at once, except on a process that waits for a file system or a driver; waiting
#: longer for that does not help.
_KILL_SECONDS = 2.0


def adopt_orphans() -> None:
    """Adopt descendants whose parent ends, so that :func:`end_descendants` finds them too."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_descendants() -> None:
    """Kill all descendants, in any process group or session, and wait until they are gone.

    Python's resource tracker is spared: it ends with its users, and removes their semaphores.
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
            # Deepest first: a process whose parent is gone prints an error before it ends.
            for child in reversed(left):
                with contextlib.suppress(psutil.Error):
                    child.kill()
            psutil.wait_procs(left, timeout=max(0.0, deadline - time.monotonic()))


def end_now(code: int, message: str = "") -> NoReturn:
    """Print to standard error, and end without the clean-up of libraries, which may hang."""
    with contextlib.suppress(OSError):
        if message:
            os.write(2, f"{message}\n".encode())
    adopt_orphans()
    end_descendants()
    os._exit(code)

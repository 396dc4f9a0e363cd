"""Processes that must not outlive the one that started them; every folder may import this."""

from __future__ import annotations

import ctypes
import os
import signal

#: ``prctl`` option of Linux: the signal a process gets when its parent ends.
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)

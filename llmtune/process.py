"""What processes have in common: the signals that ask for an end, and ending with a parent; every folder may import this."""

from __future__ import annotations

import ctypes
import os
import signal

#: ``prctl`` option of Linux: the signal a process gets when its parent ends.
_PR_SET_PDEATHSIG = 1


#: Ctrl-C; what schedulers and ``kill`` send; Slurm's warning some time before that (``sbatch --signal=USR1@600``).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)

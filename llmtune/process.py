"""Signals that ask for an end, ending with a parent process, and fast imports."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

#: ``prctl`` option of Linux: the signal a process gets when its parent ends.
_PR_SET_PDEATHSIG = 1


#: Ctrl-C; what schedulers and ``kill`` send; the end of the terminal.
END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: And Slurm's warning some time before SIGTERM (``sbatch --signal=USR1@600``).
STOP_SIGNALS = (*END_SIGNALS, signal.SIGUSR1)


def without_ignored(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Leave SIGHUP out where it is ignored: ``nohup`` lets a program outlive its terminal so."""
    return [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


#: Calls that handlers held back in a block of :func:`hold_interruptions`; None outside of one.
_held: list[Callable[[], None]] | None = None


@contextmanager
def hold_interruptions() -> Iterator[None]:
    """In the block, no signal handler raises: what it would raise is raised after the block.

    C++ code that asks Python for an operation (torch's fake tensors, its graphs) cannot always hand
    an exception on, and aborts the process. Only the main thread runs handlers, so that nothing is
    held in other threads.
    """
    global _held
    if _held is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _held = []
    try:
        yield
    finally:
        held, _held = _held, None
        if held:
            held[0]()


def raise_or_hold(act: Callable[[], None]) -> None:
    """Call ``act``, which raises, now or at the end of a block of :func:`hold_interruptions`."""
    if _held is None:
        act()
    else:
        _held.append(act)


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def no_collection() -> Iterator[None]:
    """In the block, for imports, no garbage is collected; what was imported is then frozen.

    Imported objects stay anyway: collecting among them takes a quarter of the time (torch,
    transformers, deepspeed and peft: 3.0 s with it, 2.3 s without).
    """
    was_enabled, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:
            gc.freeze()
        if was_enabled:
            gc.enable()

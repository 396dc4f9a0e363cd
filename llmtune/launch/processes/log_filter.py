"""Filter secrets out of what a rank and its libraries print, in a process between rank and log.

Libraries write to the file descriptors 1 and 2 past Python, so both are the writing end of a pipe,
and the filter reads the other one. It is a separate process, because the last output of a rank that
aborts or is killed must reach the log. It ends when the pipe has no writer left, or shortly after
the rank where a child of the rank keeps the pipe open.
"""

import contextlib
import fcntl
import os
import select
import sys
import time
from pathlib import Path

from llmtune.process import STOP_SIGNALS
from llmtune.security.redaction import redact, split_unfinished

#: An unfinished line, such as a progress bar, is shown after this pause.
QUIET_SECONDS = 0.25
#: Seconds after the end of its rank in which a filter still reads from the rank's children.
DRAIN_SECONDS = 1.0
#: A longer line is written before its end.
_MAX_LINE_BYTES = 2**20
_PACKAGE_ROOT = Path(__file__).parents[3]


def start_filter(log: Path) -> int:
    """Start a filter that appends to ``log``.

    The filter holds a shared lock on the log while it lives, for :func:`wait_for_filters`. It has
    its own process group and blocks the signals that ask for an end (Slurm sends those to every
    process of a step), so that it outlives the rank, which can print while it saves.

    Returns:
        The file descriptor to print to.
    """
    # The pipe, and the log behind it.
    read_end, write_end = os.pipe()
    target = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    # Taken here and inherited, so that the filter never runs without it.
    with contextlib.suppress(OSError):
        fcntl.flock(target, fcntl.LOCK_SH)

    # The filter's program: this module, whose imports are cheap.
    code = (
        f"import sys; sys.path.insert(0, {str(_PACKAGE_ROOT)!r}); from {__name__} import main;"
        f" main({os.getpid()})"
    )
    os.posix_spawn(
        sys.executable,
        # Isolated and without site: 30 ms, and nothing from PYTHONPATH runs in it.
        [sys.executable, "-I", "-S", "-c", code],
        os.environ,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, source, to)
            for source, to in ((read_end, 0), (target, 1), (target, 2))
        ],
        setpgroup=0,
        setsigmask=STOP_SIGNALS,
    )

    # This process keeps only the writing end, so that the pipe ends with it and its children.
    os.close(read_end)
    os.close(target)
    return write_end


def wait_for_filters(log: Path, timeout_seconds: float = 2 * DRAIN_SECONDS) -> None:
    """Wait until the filters of ended ranks have written everything."""
    deadline = time.monotonic() + timeout_seconds
    # The log may not exist, or may no longer be writable.
    with contextlib.suppress(OSError), log.open("r+b") as file:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.01)
            else:
                return


def main(rank_pid: int) -> None:
    """Filter standard input to standard output, until its end or that of the rank."""
    waiting = b""
    deadline: float | None = None
    while True:
        ready = bool(select.select([0], [], [], QUIET_SECONDS)[0])
        if ready:
            chunk = os.read(0, 2**16)
            if not chunk:
                break
            waiting = _write_lines(waiting + chunk)
        if waiting and (not ready or len(waiting) > _MAX_LINE_BYTES):
            shown, rest = split_unfinished(_decode(waiting))
            _write(shown)
            waiting = rest.encode(errors="surrogateescape")
        if os.getppid() != rank_pid:
            deadline = deadline or time.monotonic() + DRAIN_SECONDS
            if not ready or time.monotonic() > deadline:
                break
    _write(_decode(waiting))


def _write_lines(data: bytes) -> bytes:
    """Write the finished lines, also those that end in a carriage return; return the rest."""
    end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
    if end:
        _write(_decode(data[:end]))
    return data[end:]


def _decode(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


def _write(text: str) -> None:
    data = redact(text).encode(errors="surrogateescape")
    # A full disk must not end the filter: a broken pipe would end the rank.
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(1, data) :]

"""Run a verb of llmtune as a child process, and hand signals on to it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from llmtune.errors import EXIT_BY_SIGNAL, EXIT_STOPPED
from llmtune.launch.supervise.signals import StopRequests
from llmtune.process import STOP_SIGNALS
from llmtune.security.terminal import show_controls

#: Seconds between two looks at a child and its metrics.
POLL_SECONDS = 0.25
#: Lines at the end of a child's standard error that are kept.
_MOST_LINES = 40
_ERROR = "error: "
_PROGRAM = "llmtune.launch.supervise.child_program"
_STOPPED_CODES = {EXIT_STOPPED} | {
    code for number in STOP_SIGNALS for code in (-number, EXIT_BY_SIGNAL + number)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildEnd:
    """The end of a child."""

    exit_code: int
    """The number that ``Popen`` has: negative for a signal."""
    out: str = ""
    """The standard output of a child, where it was read."""
    error: str = ""
    """The reason that it gave, without the word ``error``."""

    @property
    def is_stopped(self) -> bool:
        """Tell whether a signal ended it that asks for an end."""
        return self.exit_code in _STOPPED_CODES


def run_child(
    arguments: Sequence[str],
    stops: StopRequests,
    poll: Callable[[], bool] = lambda: False,
    is_quiet: bool = False,
    shows_out: bool = False,
) -> ChildEnd:
    """Run ``python -m llmtune ARGUMENTS`` until it has ended.

    Args:
        stops: Each signal in it is sent to the child.
        poll: Called several times a second; once it returns true, the child is asked to stop.
        is_quiet: What the child writes is kept, and does not reach the terminal.
        shows_out: What the child writes goes through ``sys.stdout`` of this process, which in a
            notebook is not what a child inherits.
    """
    command = [sys.executable, "-m", _PROGRAM, str(os.getpid()), *arguments]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if is_quiet or shows_out else None,
        stderr=subprocess.PIPE,
        # Ctrl-C reaches this process alone: a child that had it twice would not save.
        start_new_session=True,
    )
    lines: deque[str] = deque(maxlen=_MOST_LINES)
    out: list[str] = []
    readers = [_read(process.stderr, lines.append, None if is_quiet else sys.stderr)]
    if process.stdout is not None:
        readers.append(_read(process.stdout, out.append, None if is_quiet else sys.stdout))
    sent, is_asked = 0, False
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
                break
            for number in stops.received[sent:]:
                process.send_signal(number)
                sent += 1
            if not is_asked and poll():
                process.send_signal(signal.SIGTERM)
                is_asked = True
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    for reader in readers:
        # Helpers of the child that outlive it for a moment hold the pipe open.
        reader.join(timeout=5)
    error = "".join(lines).rpartition(_ERROR)[2].strip() if _ERROR in "".join(lines) else ""
    return ChildEnd(exit_code=process.returncode, out="".join(out), error=error)


def _read(
    stream: IO[bytes] | None, keep: Callable[[str], None], copy: IO[str] | None
) -> threading.Thread:
    """Read lines of a child in a thread."""
    assert stream is not None

    def read() -> None:
        for raw in stream:
            line = raw.decode(errors="replace")
            keep(line)
            if copy is not None:
                # The child has taken secrets out; a library may have written past it.
                with contextlib.suppress(OSError, ValueError):
                    copy.write(show_controls(line.rstrip("\n")) + "\n")
                    copy.flush()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread

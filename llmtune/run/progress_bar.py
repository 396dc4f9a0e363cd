"""Show the progress of an export: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llmtune.export.progress import ProgressCallbacks
from llmtune.track.console import Console
from llmtune.track.status import Status


@dataclass(frozen=True, slots=True)
class Shown:
    """Callbacks with which an export reports its progress."""

    progress: ProgressCallbacks | None
    """Told of bytes; None where there is no bar."""
    say: Callable[[str], None]
    """Writes a line, above the bar."""


@contextmanager
def show_progress(what: str, say: Callable[[str], None]) -> Iterator[Shown]:
    """Show bytes written, speed and time left on standard error, if it is a terminal.

    Args:
        say: Writes a line to standard output.
    """
    # Not on a terminal: lines with the time so far, less and less often.
    if not sys.stderr.isatty():
        with Status(Console(sys.stderr), what):
            yield Shown(None, say)
        return
    from rich.console import Console as RichConsole
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    # On a terminal: a bar, which is removed at the end.
    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=RichConsole(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def say_above(text: str) -> None:
            # Both are one terminal: a line would begin at the end of the bar.
            bar.stop()
            say(text)
            sys.stdout.flush()
            bar.start()

        progress = ProgressCallbacks(
            lambda size: bar.update(task, total=size), lambda size: bar.advance(task, size)
        )
        yield Shown(progress, say_above)

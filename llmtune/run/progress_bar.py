"""Show the progress of an export: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llmtune.export.progress import ProgressCallbacks
from llmtune.track.console import Console
from llmtune.track.status import Status


@contextmanager
def show_progress(
    what: str, say: Callable[[str], None]
) -> Iterator[tuple[ProgressCallbacks, Callable[[str], None]]]:
    """Show bytes written, speed and time left on standard error, if it is a terminal.

    Args:
        say: Writes a line to standard output.

    Yields:
        Callbacks of an export: one is told of bytes, the other writes a line above the bar.
    """
    # Not on a terminal: lines with the time so far, less and less often.
    if not sys.stderr.isatty():
        with Status(Console(sys.stderr), what):
            yield ProgressCallbacks(), say
        return
    from rich.console import Console as RichConsole
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    # On a terminal: a bar, which is removed at the end.
    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=RichConsole(stderr=True), transient=True) as bar:
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
        yield progress, say_above

"""How far an export is: a bar on a terminal, nothing in a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from llmtune.export.write import Progress


@contextmanager
def show_progress(what: str) -> Iterator[Progress | None]:
    """Bytes written, speed and time left on standard error, if somebody is looking."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield Progress(lambda size: bar.update(task, total=size), lambda size: bar.advance(task, size))

"""Write the report of a run, or of several, to a file."""

from __future__ import annotations

from pathlib import Path

from llmtune.errors import CheckpointError
from llmtune.report.html import render_page
from llmtune.report.page import Page
from llmtune.report.run_facts import read_run
from llmtune.report.run_page import build_run_page
from llmtune.report.script import read_script
from llmtune.storage import layout
from llmtune.storage.atomic import write_cache_file


def write_run_report(run: Path, cache: Path, ended: bool = False) -> Path:
    """Write ``report.html`` into a run folder.

    Args:
        cache: The folder of :func:`llmtune.config.cache_folder.find_cache`.
        ended: The start that holds the folder's lock has ended its work.

    Raises:
        CheckpointError: It is no run folder, or cannot be written.
    """
    page = build_run_page(read_run(run, ended))
    file = run / layout.REPORT
    write_page(page, file, cache)
    return file


def write_page(page: Page, file: Path, cache: Path) -> None:
    """Write a page to a file, which several processes may do at once.

    Raises:
        CheckpointError: The disk refused.
    """
    text = render_page(page, read_script(cache) if page.charts else "")
    try:
        # Half a surrogate pair, which UTF-8 cannot hold, becomes a question mark.
        write_cache_file(file, text.encode(errors="replace"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be written: {error.strerror}") from error

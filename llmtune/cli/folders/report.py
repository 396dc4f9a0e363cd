"""``report``: write the page of a run, or one that compares several."""

from __future__ import annotations

import sys
from pathlib import Path

from llmtune.cli.arguments import Options
from llmtune.cli.folders.columns import align
from llmtune.cli.output import stdout_for_us
from llmtune.config.cache_folder import find_cache
from llmtune.config.composed import Composed
from llmtune.errors import EXIT_DONE, ConfigError, MissingPrerequisiteError
from llmtune.report.compare_page import build_compare_page, compare_runs
from llmtune.report.run_facts import read_run
from llmtune.report.run_page import build_run_page
from llmtune.report.script import describe_missing, find_missing
from llmtune.report.write import write_page
from llmtune.security.terminal import to_json_line
from llmtune.storage import layout
from llmtune.track.console import Console
from llmtune.track.status import Status

#: The page about several runs, beside the first one.
_COMPARISON = "compare.html"


def run(composed: Composed, options: Options) -> int:
    """Write the page, and print its table.

    Raises:
        ConfigError: No folder is named, or one twice.
        CheckpointError: One is no run folder, or the page cannot be written.
        MissingPrerequisiteError: What draws is not installed.
    """
    folders = [Path(text).expanduser() for text in options.folders]
    if not folders:
        raise ConfigError(
            "report needs run folders: python -m llmtune report runs/a, or runs/a runs/b to compare"
            " them (python -m llmtune runs lists them)"
        )
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError(f"report: a folder is named twice: {', '.join(options.folders)}")
    if missing := find_missing():
        raise MissingPrerequisiteError(describe_missing(missing))
    if len(folders) == 1 and (folders[0] / layout.STUDY).is_file():
        return _report_sweep(folders[0], composed, options)
    with Status(Console(sys.stderr), "reading the runs"):
        runs = [read_run(folder) for folder in folders]
        compared = compare_runs(runs)

    # The page of one run is where a training puts it.
    config = composed.config
    default = folders[0] / layout.REPORT if len(runs) == 1 else folders[0].parent / _COMPARISON
    file = Path(config.report.output).expanduser() if config.report.output else default
    with Status(Console(sys.stderr), "drawing the page"):
        page = build_run_page(runs[0]) if len(runs) == 1 else build_compare_page(runs)
        write_page(page, file, find_cache(config.paths))

    with stdout_for_us() as write:
        if options.as_json:
            write(to_json_line({"page": str(file), **compared.to_json()}, letters=True) + "\n")
            return EXIT_DONE
        head = ["", *compared.names]
        for rows in (compared.results, compared.differences):
            if rows:
                write("".join(f"{line}\n" for line in align(head, rows)) + "\n")
        write(f"page  {file}\n")
    return EXIT_DONE


def _report_sweep(folder: Path, composed: Composed, options: Options) -> int:
    """Write the page of a sweep, and print its table."""
    from llmtune.cli.sweep import to_lines
    from llmtune.sweep.page import build_sweep_page
    from llmtune.sweep.results import read_stored_results

    results, config = read_stored_results(folder), composed.config
    output = config.report.output
    file = Path(output).expanduser() if output else folder / layout.REPORT
    write_page(build_sweep_page(results), file, find_cache(config.paths))
    with stdout_for_us() as write:
        if options.as_json:
            write(to_json_line({"page": str(file), **results.to_json()}, letters=True) + "\n")
        else:
            write("".join(f"{line}\n" for line in to_lines(results)))
    return EXIT_DONE

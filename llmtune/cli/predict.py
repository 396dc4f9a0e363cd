"""``predict``: write what a run, a checkpoint or a model says of every row of a file."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

from llmtune.errors import ConfigError
from llmtune.launch.supervise.signals import raise_stops
from llmtune.security.terminal import to_json_line, to_terminal
from llmtune.track.console import Console
from llmtune.track.status import Status

if TYPE_CHECKING:
    from llmtune.cli.arguments import Options
    from llmtune.config.composed import Composed

_STOPPED = "stopped; the same command goes on with the rows that are left"


def run(composed: Composed, options: Options) -> int:
    """Predict every row of ``predict.input``, and say what came of it."""
    with Status(Console(sys.stderr), "loading the libraries"):
        from llmtune.predict.job import PRINTED, run_prediction
    is_printed = composed.config.predict.output in PRINTED
    if is_printed and options.as_json:
        raise ConfigError("--json prints the summary where the rows go: add predict.output=FILE")
    # Rows that are printed are not kept: the command would begin anew.
    stops = contextlib.nullcontext() if is_printed else raise_stops(_STOPPED)
    with stops, os.fdopen(os.dup(1), "wb") as printed:
        summary = run_prediction(composed, Console(sys.stderr), printed)
    if options.as_json:
        sys.stdout.write(to_terminal(to_json_line(summary) + "\n"))
    else:
        stream = sys.stderr if is_printed else sys.stdout
        stream.write(to_terminal(f"{_describe(composed, summary)}\n"))
    return 0


def _describe(composed: Composed, summary: dict[str, Any]) -> str:
    rows = summary["rows"]
    if not summary["predicted"]:
        text = f"the output is finished: {rows:,} rows"
    else:
        text = (
            f"{rows:,} rows predicted in {summary['seconds']:.1f} s"
            f" ({summary['rows_per_second']:,.1f} rows/s)"
        )
        if summary["predicted"] < rows:
            text += f"; {rows - summary['predicted']:,} of them by an earlier command"
    if summary["cut"]:
        text += f"\n{summary['cut']:,} rows were cut to data.max_seq_length"
    if summary["not_predicted"]:
        text += f"\n{summary['not_predicted']:,} rows have no prediction; their 'error' says why"
    return text if composed.config.predict.output is None else f"{text}\n{summary['output']}"

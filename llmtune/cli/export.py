"""``export`` and ``merge``: write what was trained as a model folder that other tools load."""

import sys
from pathlib import Path

from llmtune.cli.arguments import Options
from llmtune.config.composed import Composed
from llmtune.errors import ConfigError
from llmtune.export.sources.deepspeed.step_folder import is_zero_checkpoint
from llmtune.run.artifact import resolve_target
from llmtune.run.exporting import export_target, export_zero_checkpoint, output_folder
from llmtune.track.console import Console
from llmtune.track.status import Status


def run(composed: Composed, _options: Options) -> int:
    """Export what the command line names."""

    given = composed.config
    named = given.target
    if not (named.run or named.checkpoint or named.adapter):
        raise ConfigError(
            "export needs run=FOLDER, checkpoint=FOLDER, or base=MODEL adapter=FOLDER"
        )
    result = Console(sys.stdout)
    # One terminal has one progress line; elsewhere, standard output has the result alone.
    shown = result if result.is_terminal else Console(sys.stderr)
    with Status(shown, "opening the model"):
        if named.checkpoint and is_zero_checkpoint(Path(named.checkpoint).expanduser()):
            written = export_zero_checkpoint(given, result.say, shown)
        else:
            target = resolve_target(composed)
            output = output_folder(given, target)
            written = export_target(target, given, output, result.say, shown)
    if not given.export.dry_run:
        result.say(f"exported {written}")
    return 0

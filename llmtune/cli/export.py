"""``export`` and ``merge``: write what was trained as a model folder that other tools load."""

from pathlib import Path

from llmtune.cli.arguments import Options
from llmtune.config.composed import Composed
from llmtune.errors import ConfigError
from llmtune.export.sources.deepspeed.step_folder import is_zero_checkpoint
from llmtune.run.artifact import resolve_target
from llmtune.run.exporting import export_target, export_zero_checkpoint, output_folder, print_line


def run(composed: Composed, _options: Options) -> int:
    """Export what the command line names."""

    given = composed.config
    named = given.target
    if not (named.run or named.checkpoint or named.adapter):
        raise ConfigError(
            "export needs run=FOLDER, checkpoint=FOLDER, or base=MODEL adapter=FOLDER"
        )
    if named.checkpoint and is_zero_checkpoint(Path(named.checkpoint).expanduser()):
        written = export_zero_checkpoint(given)
    else:
        target = resolve_target(composed)
        written = export_target(target, given, output_folder(given, target), print_line)
    if not given.export.dry_run:
        print_line(f"exported {written}")
    return 0

"""``export`` and ``merge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.errors import ConfigError
from llmtune.export.sources.deepspeed.step_folder import is_zero_checkpoint
from llmtune.run.exporting import export_target, export_zero_checkpoint, output_folder, print_line

if TYPE_CHECKING:
    from llmtune.cli.arguments import Arguments


def main(arguments: Arguments) -> int:
    """Export what the command line names."""
    from llmtune.cli.output import quiet_libraries
    from llmtune.config.compose import compose_config
    from llmtune.run.artifact import resolve_target

    composed = compose_config(arguments.overrides, arguments.config_dir)
    quiet_libraries()
    given = composed.config
    if not (given.run or given.checkpoint.path or given.adapter):
        raise ConfigError(
            "export needs run=FOLDER, checkpoint=FOLDER, or base=MODEL adapter=FOLDER"
        )
    if given.checkpoint.path and is_zero_checkpoint(Path(given.checkpoint.path).expanduser()):
        written = export_zero_checkpoint(given)
    else:
        target = resolve_target(composed)
        written = export_target(target, given, output_folder(given, target), print_line)
    if not given.export.dry_run:
        print_line(f"exported {written}")
    return 0

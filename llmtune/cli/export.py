"""``export`` and ``merge``: write what was trained as a model folder that other tools load."""

import sys
from collections.abc import Callable
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
    result = Console(sys.stdout)
    # One terminal has one progress line; elsewhere, standard output has the result alone.
    shown = result if result.is_terminal else Console(sys.stderr)
    with Status(shown, "opening the model"):
        written = export(composed, result.say, shown)
    if not composed.config.export.dry_run:
        result.say(f"exported {written}")
    return 0


def export(composed: Composed, say: Callable[[str], None], shown: Console) -> Path:
    """Export what a configuration names.

    Args:
        say: Takes lines about the result.
        shown: Shows the progress.

    Returns:
        The folder or file that was written, or would be with ``export.dry_run=true``.

    Raises:
        ConfigError: Nothing is named.
        ExportError: A merge or an export would be wrong.
    """
    config = composed.config
    named = config.target
    if not (named.run or named.checkpoint or named.adapter):
        raise ConfigError(
            "export needs run=FOLDER, checkpoint=FOLDER, or base=MODEL adapter=FOLDER"
        )
    if named.checkpoint and is_zero_checkpoint(Path(named.checkpoint).expanduser()):
        return export_zero_checkpoint(config, say, shown)
    target = resolve_target(composed)
    return export_target(target, config, output_folder(config, target), say, shown)

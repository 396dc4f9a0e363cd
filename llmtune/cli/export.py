"""``export`` and ``merge``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.checkpoint import names
from llmtune.config.schema import Config
from llmtune.errors import ConfigError
from llmtune.export.job import ExportRequest, run_export

if TYPE_CHECKING:
    from llmtune.cli.main import Arguments
    from llmtune.cli.target import Target


def main(arguments: Arguments) -> int:
    """Export what the command line names."""
    from llmtune.cli.quiet import quiet_libraries
    from llmtune.cli.target import resolve_target
    from llmtune.config.compose import compose_config

    composed = compose_config(arguments.overrides, arguments.config_dir)
    quiet_libraries()
    given = composed.config
    if not (given.run or given.checkpoint.path or given.adapter):
        raise ConfigError("export needs run=FOLDER, checkpoint=FOLDER, or base=MODEL adapter=FOLDER")
    target = resolve_target(composed)
    output = _output(given, target)
    sys.stdout.write(f"exported {_export(target, given, output)}\n")
    return 0


def export_run(run: Path, config: Config, output: Path) -> None:
    """Export a finished run into ``output``."""
    from llmtune.cli.target import from_trained, trained_folder

    target = from_trained(config, trained_folder(run, config), run)
    _export(target, config, output)


def _export(target: Target, config: Config, output: Path) -> Path:
    request = ExportRequest(target.model_folder, target.base_name, target.adapter, target.run, output)
    return run_export(request, config.export)


def _output(given: Config, target: Target) -> Path:
    """``output_dir``, or a place beside what was exported."""
    if given.output_dir:
        return Path(given.output_dir).expanduser()
    if given.checkpoint.path:
        checkpoint = Path(given.checkpoint.path).expanduser()
        return checkpoint.with_name(f"{names.MERGED}-{checkpoint.name}")
    if target.run is not None:
        return target.run / names.MERGED
    raise ConfigError("export base= adapter= needs output_dir=FOLDER")

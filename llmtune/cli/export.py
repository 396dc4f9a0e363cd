"""``export`` and ``merge``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.checkpoint import names
from llmtune.checkpoint.signature import read_signer
from llmtune.cli.progress import show_progress
from llmtune.config.schema import Config, ModelConfig
from llmtune.errors import ConfigError, ExportError
from llmtune.export.job import run_export
from llmtune.export.material import ExportRequest
from llmtune.export.zero_adapter import has_adapter, write_adapter
from llmtune.export.zero_files import ZeroSource, is_zero_checkpoint
from llmtune.terminal import to_terminal

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
    if given.checkpoint.path and is_zero_checkpoint(Path(given.checkpoint.path).expanduser()):
        written = _export_zero(given)
    else:
        target = resolve_target(composed)
        written = _export(target, given, _output(given, target), _print)
    if not given.export.dry_run:
        _print(f"exported {written}")
    return 0


def export_run(run: Path, config: Config, output: Path, say: Callable[[str], None]) -> None:
    """Export a finished run into ``output``."""
    from llmtune.cli.target import from_trained, trained_folder

    target = from_trained(config, trained_folder(run, config), run)
    _export(target, config, output, say)


def _export(target: Target, config: Config, output: Path, say: Callable[[str], None]) -> Path:
    with show_progress(f"writing {output.name}", say) as shown:
        request = ExportRequest(
            target.model_folder,
            target.base_name,
            target.adapter,
            target.run,
            output,
            progress=shown.progress,
            say=shown.say,
            signer=read_signer(config.checkpoint.sign),
        )
        return run_export(request, config.export)


def _export_zero(given: Config) -> Path:
    """A checkpoint that DeepSpeed wrote, from whatever program; ``base=`` names the model folder it was trained from."""
    checkpoint = Path(str(given.checkpoint.path)).expanduser()
    if not given.output_dir:
        raise ConfigError("export checkpoint= of DeepSpeed needs output_dir=FOLDER")
    output = Path(given.output_dir).expanduser()
    described = _describing_folder(given, checkpoint)
    zero = ZeroSource(checkpoint)
    with (
        tempfile.TemporaryDirectory(prefix="llmtune-") as scratch,
        show_progress(f"writing {output.name}", _print) as shown,
    ):
        adapter = Path(scratch) if has_adapter(zero) else None
        if adapter is not None and not write_adapter(zero, adapter):
            raise ExportError(
                f"{checkpoint}: an adapter was trained, and its adapter_config.json is not beside it; put it there, from the "
                "program that trained it"
            )
        base_name = given.base or described.name
        own_weights = None if adapter is not None and given.base else checkpoint
        unpacked_from = checkpoint if adapter is not None else None
        request = ExportRequest(
            described,
            base_name,
            adapter,
            None,
            output,
            own_weights,
            unpacked_from,
            progress=shown.progress,
            say=shown.say,
            signer=read_signer(given.checkpoint.sign),
        )
        return run_export(request, given.export)


def _describing_folder(given: Config, checkpoint: Path) -> Path:
    """Where ``config.json`` and the tokenizer lie: ``base=``, or beside the ranks' files as Trainer puts them."""
    from llmtune.cli.prepare import cache_dir
    from llmtune.model.files import resolve_model_folder

    if given.base:
        return resolve_model_folder(ModelConfig(name_or_path=given.base), cache_dir(given))
    for folder in (checkpoint, checkpoint.parent):
        if (folder / "config.json").is_file():
            return folder
    raise ConfigError(
        f"export checkpoint={checkpoint}: no config.json there; give base=MODEL, what it was trained from"
    )


def _print(text: str) -> None:
    sys.stdout.write(to_terminal(f"{text}\n"))


def _output(given: Config, target: Target) -> Path:
    """``output_dir``, or a place beside what was exported."""
    if given.output_dir:
        return Path(given.output_dir).expanduser()
    if given.checkpoint.path:
        checkpoint = Path(given.checkpoint.path).expanduser()
        beside = names.export_folder(checkpoint.parent, given.export.format.value)
        return beside.with_name(f"{beside.name}-{checkpoint.name}")
    if target.run is not None:
        return names.export_folder(target.run, given.export.format.value)
    raise ConfigError("export base= adapter= needs output_dir=FOLDER")

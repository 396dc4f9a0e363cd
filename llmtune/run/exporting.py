"""Export a target into a published folder, for ``export`` and at the end of a training run.

Progress is shown with a bar on a terminal, and as a line now and then elsewhere.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtune.config.cache_folder import open_cache
from llmtune.config.groups.model import ModelConfig
from llmtune.config.schema import Config
from llmtune.errors import ConfigError, ExportError
from llmtune.export.pipeline import run_export
from llmtune.export.progress import ProgressCallbacks
from llmtune.export.request import ExportRequest
from llmtune.export.sources.deepspeed.checkpoint_parts import has_adapter, write_adapter
from llmtune.export.sources.deepspeed.zero_source import ZeroSource
from llmtune.model.source import resolve_model_folder
from llmtune.run.artifact import from_trained, trained_folder
from llmtune.run.target import Target
from llmtune.storage import layout
from llmtune.storage.signature import read_signer
from llmtune.track.byte_progress import ByteProgress
from llmtune.track.console import Console
from llmtune.track.status import Status


def export_run(run: Path, config: Config, output: Path, console: Console) -> None:
    """Export a finished run into ``output``."""
    target = from_trained(config, trained_folder(run, config), run)
    export_target(target, config, output, console.say, console)


def export_target(
    target: Target, config: Config, output: Path, say: Callable[[str], None], console: Console
) -> Path:
    """Export a resolved target into ``output``; return the folder that was written.

    Args:
        say: Writes a line of the result.
        console: Shows the progress.
    """
    with show_progress(f"exporting {output.name}", console) as progress:
        request = ExportRequest(
            base=target.model_folder,
            base_name=target.base_name,
            adapter=target.adapter,
            run=target.run,
            output=output,
            progress=progress,
            say=say,
            signer=read_signer(config.checkpoint.sign),
        )
        return run_export(request, config.export)


def export_zero_checkpoint(given: Config, say: Callable[[str], None], console: Console) -> Path:
    """Export a checkpoint that DeepSpeed wrote, from any program; return the written folder.

    ``base=`` names the model that it was trained from.
    """
    checkpoint = Path(str(given.target.checkpoint)).expanduser()
    if not given.output_dir:
        raise ConfigError("export checkpoint= of DeepSpeed needs output_dir=FOLDER")
    output = Path(given.output_dir).expanduser()
    described = _describing_folder(given, checkpoint)
    zero = ZeroSource(checkpoint)
    with (
        tempfile.TemporaryDirectory(prefix="llmtune-") as scratch,
        show_progress(f"exporting {output.name}", console) as progress,
    ):
        # An adapter is first written as peft does, into a folder of this start alone.
        adapter = Path(scratch) if has_adapter(zero) else None
        if adapter is not None and not write_adapter(zero, adapter):
            raise ExportError(
                f"{checkpoint}: an adapter was trained, and its adapter_config.json is not beside"
                " it; put it there, from the program that trained it"
            )

        # With ``base=`` an adapter is merged onto that model; else the checkpoint has all tensors.
        base_name = given.target.base or described.name
        own_weights = None if adapter is not None and given.target.base else checkpoint
        unpacked_from = checkpoint if adapter is not None else None
        request = ExportRequest(
            base=described,
            base_name=base_name,
            adapter=adapter,
            run=None,
            output=output,
            zero=own_weights,
            unpacked_from=unpacked_from,
            progress=progress,
            say=say,
            signer=read_signer(given.checkpoint.sign),
        )
        return run_export(request, given.export)


def _describing_folder(given: Config, checkpoint: Path) -> Path:
    """Return the folder with ``config.json`` and the tokenizer: ``base=``, or the ranks' own.

    Transformers' Trainer puts them beside the ranks' files.
    """

    if given.target.base:
        return resolve_model_folder(
            ModelConfig(name_or_path=given.target.base), open_cache(given.paths)
        )
    for folder in (checkpoint, checkpoint.parent):
        if (folder / "config.json").is_file():
            return folder
    raise ConfigError(
        f"export checkpoint={checkpoint}: no config.json there; give base=MODEL, what it was"
        " trained from"
    )


def output_folder(given: Config, target: Target) -> Path:
    """Return ``output_dir``, or a folder beside what is exported."""
    if given.output_dir:
        return Path(given.output_dir).expanduser()
    if given.target.checkpoint:
        checkpoint = Path(given.target.checkpoint).expanduser()
        beside = layout.export_folder(checkpoint.parent, given.export.format)
        return beside.with_name(f"{beside.name}-{checkpoint.name}")
    if target.run is not None:
        return layout.export_folder(target.run, given.export.format)
    raise ConfigError("export base= adapter= needs output_dir=FOLDER")


@contextmanager
def show_progress(what: str, console: Console) -> Iterator[ProgressCallbacks]:
    """Show what is being written, how much of it is, its speed and the time left.

    Yields:
        Callbacks of an export, which are told of bytes.
    """
    written = ByteProgress(with_bar=console.is_terminal)
    with Status(console, what, written.describe):
        yield ProgressCallbacks(written.expect, written.add)

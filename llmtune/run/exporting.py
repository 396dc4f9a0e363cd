"""Export a target into a published folder, for ``export`` and at the end of a training run.

Progress is shown as a bar on a terminal, and as a line now and then elsewhere.
"""

import sys
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
from llmtune.security.terminal import to_terminal
from llmtune.storage import layout
from llmtune.storage.signature import read_signer
from llmtune.track.console import Console
from llmtune.track.status import Status


def export_run(run: Path, config: Config, output: Path, say: Callable[[str], None]) -> None:
    """Export a finished run into ``output``."""
    target = from_trained(config, trained_folder(run, config), run)
    export_target(target, config, output, say)


def export_target(target: Target, config: Config, output: Path, say: Callable[[str], None]) -> Path:
    """Export a resolved target into ``output``; return the folder that was written."""
    with show_progress(f"writing {output.name}", say) as (progress, say_above):
        request = ExportRequest(
            base=target.model_folder,
            base_name=target.base_name,
            adapter=target.adapter,
            run=target.run,
            output=output,
            progress=progress,
            say=say_above,
            signer=read_signer(config.checkpoint.sign),
        )
        return run_export(request, config.export)


def export_zero_checkpoint(given: Config) -> Path:
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
        show_progress(f"writing {output.name}", print_line) as (progress, say),
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


def print_line(text: str) -> None:
    """Print a line on standard output."""
    sys.stdout.write(to_terminal(f"{text}\n"))


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
def show_progress(
    what: str, say: Callable[[str], None]
) -> Iterator[tuple[ProgressCallbacks, Callable[[str], None]]]:
    """Show bytes written, speed and time left on standard error, if it is a terminal.

    Args:
        say: Writes a line to standard output.

    Yields:
        Callbacks of an export: one is told of bytes, the other writes a line above the bar.
    """
    # Not on a terminal: lines with the time so far, less and less often.
    if not sys.stderr.isatty():
        with Status(Console(sys.stderr), what):
            yield ProgressCallbacks(), say
        return
    from rich.console import Console as RichConsole
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    # On a terminal: a bar, which is removed at the end.
    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=RichConsole(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def say_above(text: str) -> None:
            # Both are one terminal: a line would begin at the end of the bar.
            bar.stop()
            say(text)
            sys.stdout.flush()
            bar.start()

        progress = ProgressCallbacks(
            lambda size: bar.update(task, total=size), lambda size: bar.advance(task, size)
        )
        yield progress, say_above

"""Report and export a run after its ranks have ended."""

from dataclasses import replace
from pathlib import Path

from llmtune.config.groups.export import ExportConfig, ExportDtype
from llmtune.config.stored import load_config
from llmtune.storage import layout
from llmtune.track.console import Console
from llmtune.track.metrics import read_metrics
from llmtune.train.run_folder import RunFolder
from llmtune.tuner.tuner import TUNERS


def finished_message(run: Path) -> str:
    """Sum up a finished run: its last step and its losses."""
    records = read_metrics(run / layout.METRICS)
    held_out = [record["eval_loss"] for record in records if record.get("eval_loss") is not None]
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    # A run that began from the checkpoint of its last step has no lines of its own.
    finished = RunFolder(run).finished_step
    step = records[-1]["step"] if records else finished or 0
    text = f"finished: {run} is at step {step}"
    if losses:
        text += f"; training loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    if held_out:
        text += (
            f"; held-out loss {held_out[0]:.4f} -> {held_out[-1]:.4f}"
            f" ({held_out[-1] / held_out[0] - 1:+.1%})"
        )
    return text


def maybe_export(run: Path, export: ExportConfig, console: Console) -> None:
    """Export after training, unless that is done already or not asked for.

    The ranks have ended and their memory is free.
    """
    config = replace(load_config(run / layout.CONFIG), export=export)
    has_adapter = TUNERS.find(config.tuner.kind).has_adapter
    trained = layout.result_folder(run, has_adapter)
    as_trained = "adapter" if has_adapter else "safetensors"
    # What was trained lies there in its own dtype; another one has to be written.
    is_there = (
        export.format == as_trained and export.dtype is ExportDtype.auto and not export.upload
    )
    if export.format == "none" or is_there:
        console.say(f"the trained {'adapter' if has_adapter else 'model'}: {trained}")
        return
    # They bring torch along, which a run without an export does not need in this process.
    from llmtune.export.identity import is_export_of
    from llmtune.export.publish.upload import upload_export
    from llmtune.run.exporting import export_run

    exported = layout.export_folder(run, export.format)
    if export.dry_run or not is_export_of(exported, trained, export):
        export_run(run, config, exported, console.say)
    elif export.upload:
        # Cut off when the export was done: what is there already is not sent again.
        upload_export(exported, export.upload, export.upload_private, False, console.say)
    if export.dry_run:
        return
    is_merged = has_adapter and export.format == "safetensors"
    console.say(
        f"merged model: {exported}" if is_merged else f"exported {export.format}: {exported}"
    )
    console.say(f"{'adapter:     ' if has_adapter else 'trained model:'} {trained}")
    console.say(f'talk to it:   python -m llmtune chat run={run} chat.prompt="..."')

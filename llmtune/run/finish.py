"""Report and export a run after its ranks have ended."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from llmtune.config.cache_folder import find_cache
from llmtune.config.groups.export import ExportConfig, ExportDtype
from llmtune.config.schema import Config
from llmtune.config.stored import load_config
from llmtune.errors import StoppedError
from llmtune.report.refresh import LAST_SECONDS, LAST_SECONDS_AFTER_STOP, write_last_report
from llmtune.storage import layout
from llmtune.storage.rank_files import EndRecord, FinishedRecord
from llmtune.task.task import find_task
from llmtune.track.console import Console
from llmtune.track.metrics import read_metrics
from llmtune.track.webhook import tell_webhook
from llmtune.tuner.tuner import TUNERS
from llmtune.units import counted

#: Seconds that a web address has to take a message; a user or a scheduler waits for a stop.
WEBHOOK_SECONDS, WEBHOOK_SECONDS_AFTER_STOP = 40.0, 5.0
#: Letters of an error that are kept.
_MOST_LETTERS = 4000


@contextmanager
def recorded_failure(run: Path, config: Config, say: Callable[[str], None]) -> Iterator[None]:
    """Record in the run folder that the block was stopped or failed, and write the report."""
    try:
        yield
    except BaseException as error:
        is_stop = isinstance(error, StoppedError | KeyboardInterrupt)
        seconds = LAST_SECONDS_AFTER_STOP if is_stop else LAST_SECONDS
        _record_end(run, config, say, "stopped" if is_stop else "failed", str(error), seconds)
        raise


@contextmanager
def recorded_end(run: Path, config: Config, say: Callable[[str], None]) -> Iterator[None]:
    """Record in the run folder how the block behind the training ended, and write the report."""
    with recorded_failure(run, config, say):
        yield
    _record_end(run, config, say, "finished", "", LAST_SECONDS)


def _record_end(
    run: Path,
    config: Config,
    say: Callable[[str], None],
    outcome: str,
    message: str,
    seconds: float,
) -> None:
    """Write ``ended.json`` and ``report.html``, both for people: a full disk is no new error."""
    message = message.strip()[:_MOST_LETTERS]
    try:
        EndRecord(outcome=outcome, time=time.time(), message=message).write(run)
    except OSError as error:
        say(f"{run / layout.ENDED} cannot be written: {error.strerror}")
    is_stop = outcome == "stopped"
    text = message.partition("\n")[0] if message else finished_message(run)
    wait = WEBHOOK_SECONDS_AFTER_STOP if is_stop else WEBHOOK_SECONDS
    tell_webhook(config.tracker.webhook, run, outcome, text, wait, say)
    if config.report.write:
        write_last_report(run, find_cache(config.paths), say, seconds)


def finished_message(run: Path) -> str:
    """Sum up a finished run: its last step and its losses."""
    records = read_metrics(run / layout.METRICS)
    held_out = [record["eval_loss"] for record in records if record.get("eval_loss") is not None]
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    # A run that began from the checkpoint of its last step has no lines of its own.
    finished = FinishedRecord.read(run)
    last_step = finished.step if finished is not None else 0
    step = records[-1]["step"] if records else last_step
    text = f"finished: {run} is at step {step}"
    if losses:
        text += f"; training loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    if held_out:
        text += (
            f"; held-out loss {held_out[0]:.4f} -> {held_out[-1]:.4f}"
            f" ({held_out[-1] / held_out[0] - 1:+.1%})"
        )
    if finished is not None:
        text += describe_end(finished)
    return text


def describe_end(finished: FinishedRecord) -> str:
    """Describe an early end, and which step the published model is of; empty without a best."""
    text, best = "", finished.best
    if finished.stopped_early and finished.goal is not None:
        text += (
            f"; stopped early: {finished.goal.rpartition(' ')[2]} did not improve in"
            f" {counted(finished.stale_evaluations or 0, 'evaluation')}"
            " (train.early_stopping_patience; null or a larger one trains on)"
        )
    if best is not None:
        text += f"; best {best['metric']} {best['value']:.4f} at step {best['step']}"
    if best is not None or finished.loaded_best:
        which = "the best" if finished.loaded_best else "the last"
        text += f"; the trained model is that of step {finished.published_step}, {which}"
    return text


def maybe_export(run: Path, export: ExportConfig, console: Console) -> None:
    """Export after training, unless that is done already or not asked for.

    The ranks have ended and their memory is free.
    """
    config = replace(load_config(run / layout.CONFIG), export=export)
    has_adapter = TUNERS.find(config.tuner.kind).has_adapter
    trained = layout.result_folder(run, has_adapter)
    as_trained = "adapter" if has_adapter else "safetensors"
    # What was trained is there in its own dtype; another dtype has to be written.
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

    # Export, unless an earlier start has; then only its upload may be missing.
    exported = layout.export_folder(run, export.format)
    if export.dry_run or not is_export_of(exported, trained, export):
        export_run(run, config, exported, console)
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
    if find_task(config.model.task).generates:
        console.say(f'talk to it:   python -m llmtune chat run={run} chat.prompt="..."')
    else:
        console.say(f"use it:       python -m llmtune predict run={run} predict.input=FILE")

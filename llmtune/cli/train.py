"""``train``: prepare, supervise the ranks, export. Under ``deepspeed`` or ``torchrun``: be one of their ranks."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.checkpoint import names
from llmtune.launch.environment import launched_world_size, set_defaults
from llmtune.launch.lock import hold_lock
from llmtune.launch.ops import build_in_child, missing_ops
from llmtune.launch.supervisor import run_ranks
from llmtune.plan.units import format_seconds
from llmtune.track.console import Console
from llmtune.track.metrics import read_metrics

if TYPE_CHECKING:
    import argparse  # noqa: F401

    from llmtune.cli.main import Arguments
    from llmtune.train.request import RunRequest


def main(arguments: Arguments) -> int:
    """Run the whole job."""
    world_size = launched_world_size()
    if world_size is not None:
        from llmtune.cli.rank import run_launched

        return run_launched(arguments, world_size)
    return _supervise(arguments)


def _supervise(arguments: Arguments) -> int:
    import sys

    from llmtune.cli.prepare import compose_run, describe, lock_file, resolve_request
    from llmtune.cli.quiet import quiet_libraries

    started = time.monotonic()
    console = Console(sys.stdout)
    composed, target, folder = compose_run(arguments.overrides, arguments.config_dir)
    with hold_lock(lock_file(folder)):
        set_defaults_before_torch(composed.config.launch.nproc)
        quiet_libraries()
        request = resolve_request(composed, target, folder, console.say)
        if request is None:
            console.say(finished_message(target.folder))
        else:
            console.page("llmtune", describe(request))
            _run(request, console)
            console.say(f"trained in {format_seconds(time.monotonic() - started)}, start-up included")
            console.say(finished_message(target.folder))
        maybe_export(target.folder, console)
    return 0


def set_defaults_before_torch(nproc: int | None) -> None:
    """Environment that torch reads when it is imported; the accelerator is settled by the plan, later."""
    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if nproc:
        os.environ.setdefault("LOCAL_SIZE", str(nproc))


def _run(request: RunRequest, console: Console) -> None:
    plan = request.plan
    set_defaults(plan.hardware.accelerator, plan.world_size)
    for op in missing_ops(plan.hardware.accelerator, plan.placement.offload_optimizer):
        console.say(f"building DeepSpeed's {op.removesuffix('Builder')} (once an environment, about a minute) ...")
        build_in_child(op)
    with tempfile.TemporaryDirectory(prefix="llmtune-") as folder:
        path = Path(folder) / "request.json"
        path.write_text(request.to_json())
        run_ranks(["-m", "llmtune.cli.rank", str(path)], plan.world_size, request.run_folder / names.LOG, console.say)


def finished_message(run: Path) -> str:
    """What a finished run came to."""
    records = read_metrics(run / names.METRICS)
    held_out = [record["eval_loss"] for record in records if "eval_loss" in record]
    losses = [record["loss"] for record in records if "loss" in record]
    step = records[-1]["step"] if records else 0
    text = f"finished: {run} is at step {step}"
    if losses:
        text += f"; training loss {losses[0]:.4f} -> {losses[-1]:.4f}"
    if held_out:
        text += f"; held-out loss {held_out[0]:.4f} -> {held_out[-1]:.4f} ({held_out[-1] / held_out[0] - 1:+.1%})"
    return text


def maybe_export(run: Path, console: Console) -> None:
    """Export after training, unless that is done or was not wanted; the ranks have ended and their memory is free."""
    from llmtune.cli.export import export_run
    from llmtune.config.compose import load_config
    from llmtune.config.schema import ExportFormat, TunerKind

    config = load_config(run / names.CONFIG)
    lora = config.tuner.kind is TunerKind.lora
    if config.export.format is not ExportFormat.safetensors or not lora:
        console.say(f"the trained {'adapter' if lora else 'model'}: {run / (names.ADAPTER if lora else names.MODEL)}")
        return
    merged = run / names.MERGED
    if not _is_newer(merged, run / names.FINISHED):
        export_run(run, config, merged)
    console.say(f"merged model: {merged}\nadapter:      {run / names.ADAPTER}")
    console.say(f'talk to it:   python -m llmtune chat run={run} chat.prompt="..."')


def _is_newer(folder: Path, than: Path) -> bool:
    marker = folder / names.COMPLETE
    return marker.is_file() and marker.stat().st_mtime >= than.stat().st_mtime

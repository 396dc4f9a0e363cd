"""``train``: prepare, supervise the ranks, export. Under ``deepspeed`` or ``torchrun``: be one of their ranks."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.checkpoint import names
from llmtune.errors import LlmtuneError
from llmtune.launch.environment import launched_world_size, set_defaults
from llmtune.launch.lock import hold_lock
from llmtune.launch.ops import ensure_ops
from llmtune.launch.supervisor import run_ranks
from llmtune.plan.units import format_seconds
from llmtune.track.console import Console

if TYPE_CHECKING:
    from llmtune.cli.main import Arguments
    from llmtune.train.request import RunRequest


def main(arguments: Arguments) -> int:
    """Run the whole job."""
    if launched_world_size() is not None:
        from llmtune.cli.rank import run_launched

        run_launched(arguments)
    return _supervise(arguments)


def _supervise(arguments: Arguments) -> int:
    from llmtune.cli.finish import finished_message, maybe_export
    from llmtune.cli.prepare import describe, lock_file, resolve_request, resolve_target
    from llmtune.cli.quiet import quiet_libraries
    from llmtune.config.compose import compose_config
    from llmtune.plan.resolve import resolve_plan
    from llmtune.train.run_folder import open_run_folder

    started = time.monotonic()
    console = Console(sys.stdout)
    composed = compose_config(arguments.overrides, arguments.config_dir)
    target = resolve_target(composed)
    quiet_libraries()
    # Before the folder: a run that does not fit leaves nothing behind.
    plan = resolve_plan(composed.config)
    folder = open_run_folder(target.folder)
    with hold_lock(lock_file(folder)):
        request = resolve_request(composed, plan, target, folder, console.say)
        if request is None:
            console.say(finished_message(target.folder))
        else:
            console.page("llmtune", describe(request))
            _run(request, console)
            console.say(f"trained in {format_seconds(time.monotonic() - started)}, start-up included")
            console.say(finished_message(target.folder))
        maybe_export(target.folder, composed.config.export, console)
    return 0


def _run(request: RunRequest, console: Console) -> None:
    plan = request.plan
    set_defaults(plan.hardware.accelerator, plan.world_size)
    ensure_ops(plan.hardware.accelerator, plan.placement.offload_optimizer, console.say)
    with tempfile.TemporaryDirectory(prefix="llmtune-") as folder:
        path = Path(folder) / "request.json"
        path.write_text(request.to_json())
        log = request.run_folder / names.LOG
        run_ranks(["-m", "llmtune.cli.rank", str(path)], plan.world_size, log, console.say)
    if not (request.run_folder / names.FINISHED).is_file():
        raise LlmtuneError(f"all ranks ended without an error, but the run is not finished; see {log}")

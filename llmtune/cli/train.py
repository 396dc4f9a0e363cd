"""``train``: prepare, supervise the ranks, export. Under ``deepspeed`` or ``torchrun``: be one of their ranks."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from llmtune.launch.environment import launched_world_size
from llmtune.launch.lock import hold_lock
from llmtune.plan.units import format_seconds
from llmtune.track.console import Console

if TYPE_CHECKING:
    from llmtune.cli.main import Arguments


def main(arguments: Arguments) -> int:
    """Run the whole job."""
    if launched_world_size() is not None:
        from llmtune.cli.rank import run_launched

        run_launched(arguments)
    return _supervise(arguments)


def _supervise(arguments: Arguments) -> int:
    from llmtune.cli.descent import Descent, check_fits
    from llmtune.cli.finish import finished_message, maybe_export
    from llmtune.cli.prepare import lock_file, resolve_target
    from llmtune.cli.quiet import quiet_libraries
    from llmtune.config.compose import compose_config
    from llmtune.plan.resolve import resolve_ladder
    from llmtune.train.run_folder import open_run_folder

    started = time.monotonic()
    console = Console(sys.stdout)
    composed = compose_config(arguments.overrides, arguments.config_dir)
    target = resolve_target(composed)
    quiet_libraries()
    # Before the folder: a run that does not fit leaves nothing behind.
    ladder = resolve_ladder(composed.config)
    check_fits(composed.config, ladder)
    folder = open_run_folder(target.folder)
    with hold_lock(lock_file(folder)):
        if Descent(composed, ladder, target, folder, console).run():
            console.say(f"trained in {format_seconds(time.monotonic() - started)}, start-up included")
        console.say(finished_message(target.folder))
        maybe_export(target.folder, composed.config.export, console)
    return 0

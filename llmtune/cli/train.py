"""``train``: prepare, supervise the ranks, export.

Under ``deepspeed``, ``torchrun`` or ``srun``, run one of their ranks.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from llmtune.launch.launchers.environment import (
    launched_ranks_on_node,
    set_allocator_default,
    set_network_default,
    set_thread_default,
)
from llmtune.launch.launchers.launcher import Launcher, adopt_launcher
from llmtune.launch.processes.parent_death import follow_launcher
from llmtune.launch.supervise.signals import NOT_BEGUN, NOT_EXPORTED, raise_stops
from llmtune.storage.lock import hold_lock, removed_if_unused
from llmtune.track.console import Console
from llmtune.track.status import Status
from llmtune.units import format_seconds

if TYPE_CHECKING:
    from llmtune.cli.arguments import Options
    from llmtune.config.composed import Composed
    from llmtune.run.attempt import RunTarget


def join_launcher() -> Launcher | None:
    """Find out whether another launcher started this process as a rank, and prepare for that.

    The configuration is composed later: a plug-in that it looks for may import torch, which reads
    the defaults of the environment.

    Raises:
        MissingPrerequisiteError: The launcher's variables contradict each other.
    """
    launcher = adopt_launcher(os.environ, Console(sys.stdout).say)
    if launcher is None:
        return None
    if launcher.stays:
        follow_launcher()
    set_thread_default(launched_ranks_on_node())
    set_allocator_default()
    set_network_default()
    return launcher


def run(composed: Composed, options: Options) -> int:
    """Run the whole job."""
    if options.launcher is not None:
        with raise_stops(NOT_BEGUN):
            from llmtune.run.launched import run_launched

            run_launched(composed, options.launcher)
    console = Console(sys.stdout)
    with ExitStack() as lock, raise_stops(NOT_BEGUN) as stop:
        if composed.config.launch.hostfile is not None:
            _hand_over(composed, options)
        target = _train(composed, console, lock)
        stop.message = NOT_EXPORTED
        from llmtune.run.finish import finished_message, maybe_export, recorded_end

        console.say(finished_message(target.folder))
        with (
            Status(console, "ending the run"),
            recorded_end(target.folder, composed.config, console.say),
        ):
            maybe_export(target.folder, composed.config.export, console)
    return 0


def _train(composed: Composed, console: Console, lock: ExitStack) -> RunTarget:
    """Plan and train until the end; ``lock`` then holds the lock of the run folder."""
    with Status(console, "loading the libraries and planning"):
        return _plan_and_train(composed, console, lock)


def _plan_and_train(composed: Composed, console: Console, lock: ExitStack) -> RunTarget:
    from llmtune.cli.output import quiet_environment, quiet_libraries
    from llmtune.data.read.parse_sources import check_local_files
    from llmtune.plan.advice import check_fits
    from llmtune.plan.resolve import resolve_ladder
    from llmtune.run.adapter import adopt_adapter, check_adapter
    from llmtune.run.attempt import lock_file, resolve_run_target
    from llmtune.run.fallback import FallbackRunner
    from llmtune.run.prepare import prepare_run
    from llmtune.run.ranks_ahead import RanksAhead, Surroundings
    from llmtune.run.task import adopt_task
    from llmtune.train.begun import begun_train
    from llmtune.train.run_folder import RunFolder, open_run_folder

    started = time.monotonic()
    target = resolve_run_target(composed)
    composed = adopt_task(adopt_adapter(composed, target.folder))
    quiet_environment()
    before = RunFolder(target.folder)
    if before.finished_step is None:
        check_local_files(composed.config.data)
    with (
        RanksAhead(composed.config.tuner.kind) as ahead,
        removed_if_unused(lock_file(before)),
    ):
        # A finished run may have nothing to do, and one that ran out of memory before begins on
        # another rung: their ranks are not started ahead.
        is_first = before.finished_step is None and not before.read_record().history
        ahead.start(Surroundings.guess(composed.config) if is_first else None)
        # The plan comes before the folder: a run that does not fit leaves nothing behind.
        ladder = resolve_ladder(
            composed.config, begun=begun_train(composed.config, target.folder, target.name)
        )
        check_fits(composed.config, ladder)
        check_adapter(composed.config, ladder.shape, target.folder)
        folder = open_run_folder(target.folder, console.say)
        lock.enter_context(hold_lock(lock_file(folder)))
        quiet_libraries()
        trained = FallbackRunner(
            composed=composed,
            ladder=ladder,
            target=target,
            folder=folder,
            console=console,
            prepare=prepare_run,
            ahead=ahead if is_first else None,
        ).run()
    if trained:
        console.say(f"trained in {format_seconds(time.monotonic() - started)}, start-up included")
    return target


def _hand_over(composed: Composed, options: Options) -> NoReturn:
    """Replace this process by DeepSpeed's runner, which starts the ranks of ``launch.hostfile``.

    Each rank is given the same command line.
    """
    from llmtune.launch.launchers.hostfile import exec_runner

    command = ["train"]
    if options.config_dir:
        command += ["--config-dir", str(Path(options.config_dir).resolve())]
    hostfile = Path(str(composed.config.launch.hostfile)).expanduser()
    exec_runner(hostfile, [*command, *composed.overrides])

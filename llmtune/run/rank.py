"""One rank under llmtune's supervisor: ``python -m llmtune.run.rank REQUEST``.

With ``--ahead TUNER`` in the place of REQUEST it imports the libraries that the tuner needs, and
then reads REQUEST from standard input. Ranks of other launchers are in :mod:`llmtune.run.launched`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from llmtune.engine.phases.heartbeat import PhaseLog
from llmtune.launch.launchers.environment import (
    FAILURE_DIR,
    launched_ranks_on_node,
)
from llmtune.launch.preflight.affinity import bind_to_gpu
from llmtune.launch.processes.parent_death import die_with_supervisor
from llmtune.launch.supervise.rank_report import (
    hold_output,
    redirect_output,
    report_failure,
)
from llmtune.launch.supervise.stacks import answer_with_stacks
from llmtune.process import no_collection
from llmtune.storage import layout
from llmtune.storage.rank_files import heard_file, import_file, meeting_file, phase_file
from llmtune.track.console import Console
from llmtune.track.status import HANDED_OVER_SECONDS, Status
from llmtune.tuner.tuner import TUNERS

if TYPE_CHECKING:
    from llmtune.train.request import RunRequest


def main(arguments: list[str]) -> NoReturn:
    """Run one rank: train as REQUEST says, and report an error to the supervisor."""
    die_with_supervisor()
    # Slurm sends it to every process of a job; the supervisor forwards it as SIGTERM.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    rank = int(os.environ["RANK"])
    folder = Path(os.environ[FAILURE_DIR])
    answer_with_stacks(folder, rank)

    # The request; a rank that was started ahead does its imports until there is one.
    request_file, imported = arguments[0], import_file(folder, rank)
    if request_file == "--ahead":
        request_file = _import_and_wait(arguments[1], imported)
    text = Path(request_file).read_text()

    # Output goes to the log from here on, that of the imports included.
    run_folder = Path(_peek(text, "run_folder"))
    stream = redirect_output(run_folder / layout.LOG)
    if imported.exists():
        sys.stderr.write(imported.read_text(errors="replace"))
    trace = False
    try:
        console = Console(stream if rank == 0 else None)
        console.said_at = time.monotonic() - HANDED_OVER_SECONDS
        phases = PhaseLog(phase_file(folder, rank))
        with show_phases(console, phases):
            if rank == 0:
                heard_file(folder).touch()
            from llmtune.train.request import RunRequest

            request = RunRequest.from_json(text)
            trace = request.config.trace
            limit_own_memory(request)
            make_own_swap(request)
            _train(request, console, phases)
    except BaseException as error:
        exit_now(report_failure(error, rank, stream, trace))
    exit_now(0)


def _import_and_wait(tuner: str, output: Path) -> str:
    """Import the libraries while the supervisor prepares; return the request that it then names.

    Args:
        output: Gets what the imports print.
    """
    with hold_output(output):
        try:
            import_libraries(tuner)
        except Exception:
            # The import fails again where it is needed, and is reported from there. The first
            # traceback says most.
            traceback.print_exc()
    port, _, request_file = sys.stdin.readline().strip().partition(" ")
    if not request_file:
        # The supervisor found a reason not to begin.
        exit_now(0)
    os.environ["MASTER_PORT"] = port
    return request_file


def import_libraries(tuner: str) -> None:
    """Import the libraries that every training needs, which takes seconds."""
    with no_collection():
        import transformers.modeling_utils  # noqa: F401

        import llmtune.train.builders.job  # noqa: F401
        from llmtune.engine.distributed import import_deepspeed

        import_deepspeed()

    TUNERS.find(tuner).import_libraries()


def _train(request: RunRequest, console: Console, phases: PhaseLog) -> None:
    from llmtune.engine.distributed import barrier, init_ranks
    from llmtune.launch.preflight.deepspeed_ops import load_ops
    from llmtune.train.builders.job import run_job

    if request.plan.hardware.accelerator == "cuda":
        bind_to_gpu(int(os.environ["LOCAL_RANK"]), launched_ranks_on_node())
    load_ops(request.plan.hardware.accelerator, request.plan.placement)
    rank = init_ranks(phases=phases, meeting=meeting_file(Path(os.environ[FAILURE_DIR])))
    run_job(request, rank, console)
    barrier(rank)


def show_phases(console: Console, phases: PhaseLog) -> Status:
    """Show the phase on this rank's console while it takes long."""
    return Status(console, phases.describe, phases.describe_place)


def limit_own_memory(request: RunRequest) -> None:
    """Apply ``launch.memory_limit``, which the plan does not take into account."""
    from llmtune.config.byte_sizes import parse_bytes
    from llmtune.launch.supervise.rank_report import limit_memory

    limit = request.config.launch.memory_limit
    if limit is not None:
        limit_bytes = parse_bytes(limit, "launch.memory_limit")
        limit_memory(limit_bytes, request.plan.hardware.accelerator, int(os.environ["LOCAL_RANK"]))


def make_own_swap(request: RunRequest) -> None:
    """Make the swap folder private, on every machine, before DeepSpeed makes it readable to all."""
    from llmtune.launch.preflight.nvme import make_swap_folder, swap_folder

    path = request.config.offload.nvme_path
    if request.plan.placement.uses_nvme and path is not None:
        make_swap_folder(swap_folder(path, request.run_folder))


def exit_now(code: int) -> NoReturn:
    """End without the clean-up of libraries.

    It waits for ranks that are gone, and gloo's threads sometimes abort in it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _peek(text: str, key: str) -> str:
    return str(json.loads(text)[key])


if __name__ == "__main__":
    main(sys.argv[1:])

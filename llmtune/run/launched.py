"""One rank under ``torchrun``, ``deepspeed`` or ``srun``.

Rank 0 prepares the run. The others get the request that it resolved, or its error.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from llmtune.config.composed import Composed
from llmtune.errors import (
    ERRORS_BY_CODE,
    EXIT_STOPPED,
    ConfigError,
    DoesNotFitError,
    LlmtuneError,
    StoppedError,
)
from llmtune.launch.launchers.environment import (
    launched_nodes,
    launched_ranks_on_node,
    remove_shared_buffers,
    set_defaults,
)
from llmtune.launch.launchers.launcher import Launcher
from llmtune.launch.launchers.meeting import await_ranks
from llmtune.launch.preflight.affinity import bind_to_gpu
from llmtune.launch.preflight.deepspeed_ops import ensure_ops, load_ops
from llmtune.launch.supervise.next_rung import (
    NextRungError,
    remove_failures,
    take_failures,
    tell_next_start,
)
from llmtune.launch.supervise.out_of_memory import MemoryEvent
from llmtune.launch.supervise.rank_report import redirect_output, report_failure, to_user_error
from llmtune.launch.supervise.rank_watchdog import RankWatchdog
from llmtune.launch.supervise.signals import NOT_BEGUN, NOT_EXPORTED, raise_stops
from llmtune.plan.advice import check_fits
from llmtune.plan.devices.probe import resolve_accelerator
from llmtune.plan.ladder import Candidate, candidate_key, failure_conditions
from llmtune.plan.memory.placement import Placement
from llmtune.plan.plan import Plan
from llmtune.plan.resolve import plan_candidate, resolve_ladder
from llmtune.plan.run_record import MemoryFailure
from llmtune.run.adapter import adopt_adapter, check_adapter
from llmtune.run.attempt import RunTarget, attempt, lock_file, resolve_run_target
from llmtune.run.describe import describe
from llmtune.run.rank import exit_now, limit_own_memory, make_own_swap, show_phases
from llmtune.security.terminal import to_terminal
from llmtune.storage import layout
from llmtune.track.console import Console
from llmtune.track.status import Status
from llmtune.train.begun import begun_train
from llmtune.train.request import RunRequest
from llmtune.train.run_folder import RunFolder, open_run_folder

if TYPE_CHECKING:
    from llmtune.engine.distributed import Rank


def run_launched(composed: Composed, launcher: Launcher) -> NoReturn:
    """Run the rank that ``launcher`` started: train, and end this process with an exit code."""

    # The run folder, and the environment before DeepSpeed reads it.
    composed = _on_nodes(composed)
    target = resolve_run_target(composed)
    folder = open_run_folder(target.folder, lambda _: None)
    accelerator = resolve_accelerator(composed.config.hardware.accelerator)
    set_defaults(accelerator, launched_ranks_on_node())
    if accelerator == "cuda":
        bind_to_gpu(int(os.environ["LOCAL_RANK"]), launched_ranks_on_node())

    # From here on, output goes to the log; rank 0 alone writes to the console.
    stream = redirect_output(folder.path / layout.LOG)
    rank = launcher.rank
    console = Console(stream if rank == 0 else None)
    try:
        with ExitStack() as stack:
            stack.enter_context(Status(console, "starting the ranks"))
            # What the process group needs; rank 0 builds the rest when it has planned.
            ensure_ops(accelerator, Placement(0), console.say)
            load_ops(accelerator, Placement(0))
            stack.enter_context(raise_stops(NOT_BEGUN))
            watch = RankWatchdog(rank, folder.path, lambda text: _tell(stream, text))
            stack.callback(watch.remove)
            # Held until this rank ends.
            meeting = await_ranks(launcher)
            _train_launched(composed, target, folder, console, watch)
            del meeting
    except NextRungError as error:
        exit_now(report_failure(error, rank, stream, composed.config.trace))
    except StoppedError as error:
        console.say(str(error))
        exit_now(EXIT_STOPPED)
    except BaseException as error:
        exit_now(report_failure(error, rank, stream, composed.config.trace))
    exit_now(0)


def _train_launched(
    composed: Composed, target: RunTarget, folder: RunFolder, console: Console, watch: RankWatchdog
) -> None:
    from llmtune.engine.distributed import broadcast_object, init_ranks
    from llmtune.engine.phases.heartbeat import PhaseLog
    from llmtune.run.fallback import hold_nvme
    from llmtune.run.finish import recorded_failure
    from llmtune.storage.lock import hold_lock

    phases = PhaseLog(watch.record)
    with show_phases(console, phases):
        rank = init_ranks(phases=phases)
    _check_run_folder(folder.path, rank)
    # All have joined. A launcher does not clean up after its ranks, and these may be killed.
    remove_shared_buffers(int(os.environ["MASTER_PORT"]), os.environ["MASTER_ADDR"])
    with ExitStack() as stack:
        # Rank 0 prepares the run, and holds its lock and its swap folder until the end.
        answer: dict[str, Any] = {}
        if rank.is_first:
            try:
                stack.enter_context(hold_lock(lock_file(folder)))
                with Status(console, "preparing the model and the data"):
                    prepared = _prepare_first(composed, target, folder, console, rank.world_size)
                if prepared is not None:
                    stack.enter_context(
                        hold_nvme(prepared.config, prepared.plan, prepared.run_folder, console)
                    )
                answer = {"request": prepared.to_json() if prepared else None}
            except Exception as error:
                answer = _as_answer(error)

        # Every rank gets the request, or ends with the error of rank 0.
        answer = broadcast_object(answer, rank)
        if "error" in answer:
            raise ERRORS_BY_CODE.get(answer["code"], LlmtuneError)(answer["error"])
        if answer["request"] is not None:
            # This rank's own preparation, then the training.
            request = RunRequest.from_json(answer["request"])
            _check_shared_files(request, rank)
            load_ops(request.plan.hardware.accelerator, request.plan.placement)
            limit_own_memory(request)
            make_own_swap(request)
            recorded: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if rank.is_first:
                recorded = recorded_failure(request.run_folder, request.config, console.say)
            with show_phases(console, phases), recorded:
                _run_watched(request, rank, console, watch)
        if rank.is_first:
            _finish_first(composed, target, console)


def _run_watched(request: RunRequest, rank: Rank, console: Console, watch: RankWatchdog) -> None:
    """Train under the watchdog, which ends with the training.

    A rank may then wait long for rank 0, which finishes its copies elsewhere.
    """
    from llmtune.engine.distributed import barrier
    from llmtune.run.fallback import may_move
    from llmtune.train.builders.job import run_job

    failures: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if may_move(request.config):
        failures = tell_next_start(
            request.run_folder, rank.rank, watch.record.parent, partial(_to_failure, request)
        )
    try:
        with failures, watch.watch(request.config.launch.hang_timeout):
            run_job(request, rank, console)
    except NextRungError:
        raise
    except StoppedError:
        # At the end of the first rank the launcher ends the others. All have saved by now, and a
        # rank that does not come to the barrier has ended.
        with contextlib.suppress(RuntimeError):
            barrier(rank)
        raise
    barrier(rank)


def _to_failure(request: RunRequest, event: MemoryEvent) -> MemoryFailure:
    """Return memory that ran out, with the placement of this attempt."""
    plan = request.plan
    return MemoryFailure(
        candidate=candidate_key(plan.placement, plan.batch, plan.recomputed),
        conditions=failure_conditions(
            plan.hardware, plan.world_size, request.config.launch.memory_limit
        ),
        time=time.time(),
        **asdict(event),
    )


def _on_nodes(composed: Composed) -> Composed:
    """Return the config with the launcher's number of machines, for the plan."""
    config = composed.config
    hardware = replace(config.hardware, nodes=launched_nodes())
    return replace(composed, config=replace(config, hardware=hardware))


def _check_run_folder(folder: Path, rank: Rank) -> None:
    """Check that every rank sees what rank 0 writes to the run folder. Collective.

    Raises:
        ConfigError: On every rank, with the machines on which it is another folder.
    """
    from llmtune.engine.distributed import broadcast_object, gather_objects

    # A name that no rank can have looked up before: network file systems remember that a file did
    # not exist.
    mark = folder / broadcast_object(f".seen-by-all-{uuid.uuid4().hex}", rank)
    if rank.is_first:
        mark.touch()
    broadcast_object(None, rank)
    blind = gather_objects(None if mark.exists() else socket.gethostname(), rank)
    if rank.is_first:
        mark.unlink(missing_ok=True)
    if any(blind):
        raise ConfigError(
            f"output_dir={folder} is another folder on {_join(blind)} than on the machine of rank"
            " 0: output_dir has to be on a file system that all nodes share, with the same path on"
            " each, for every rank writes its part of a checkpoint"
        )


def _check_shared_files(request: RunRequest, rank: Rank) -> None:
    """Check that every rank sees the files that rank 0 has prepared. Collective.

    Raises:
        ConfigError: On every rank, with what is missing and where.
    """
    from llmtune.engine.distributed import broadcast_object, gather_objects

    needed = [
        request.model_folder,
        Path(request.data.folder),
        *map(Path, request.data.train_stores),
    ]
    if request.resume_from is not None:
        needed.append(request.resume_from)
    there = broadcast_object([str(path) for path in needed if path.exists()], rank)
    absent = [path for path in there if not Path(path).exists()]
    missing = gather_objects(f"{absent[0]} on {socket.gethostname()}" if absent else None, rank)
    if any(missing):
        raise ConfigError(
            f"missing: {_join(missing)}. Rank 0 prepares the model and the rows for all:"
            " paths.cache_dir (and HF_HOME) have to be on a file system that all nodes share"
        )


def _join(texts: list[str | None]) -> str:
    return ", ".join(dict.fromkeys(text for text in texts if text))


def _tell(stream: IO[str], text: str) -> None:
    """Write a line for a rank whose console is silent."""
    with contextlib.suppress(OSError, ValueError):
        stream.write(to_terminal(f"\n{text}\n"))
        stream.flush()


def _prepare_first(
    composed: Composed, target: RunTarget, folder: RunFolder, console: Console, world_size: int
) -> RunRequest | None:
    from llmtune.run.fallback import place_swap
    from llmtune.run.prepare import prepare_run
    from llmtune.run.task import adopt_task

    composed = adopt_task(adopt_adapter(composed, target.folder))
    # Also where the last rung has failed once more, so that a scheduler does not try it for ever.
    is_new = any(folder.path.glob(layout.MEMORY_FAILURES))
    history = take_failures(folder.path, folder.read_record().history)
    if is_new:
        # The record first, so that no end of this start forgets them.
        folder.write_record(replace(folder.read_record(), history=history))
    remove_failures(folder.path)
    plan = place_swap(
        _plan_next(composed, target, world_size, history, is_new, console),
        composed,
        target,
    )
    check_adapter(composed.config, plan.shape, target.folder)
    inputs = prepare_run(composed, plan, target, folder, console)
    request = attempt(inputs, plan, inputs.resume_from, console, history)
    if request is not None:
        console.page("llmtune", describe(request))
        ensure_ops(plan.hardware.accelerator, plan.placement, console.say)
    return request


def _plan_next(
    composed: Composed,
    target: RunTarget,
    world_size: int,
    history: tuple[MemoryFailure, ...],
    is_new: bool,
    console: Console,
) -> Plan:
    """Plan the ladder's choice, or the rung below those that ran out of memory before.

    Args:
        is_new: The last start ran out of memory, and nobody has been told yet.

    Raises:
        DoesNotFitError: No rung fits, or none is left below the one of the last start.
    """
    from llmtune.run.fallback import skip_failed

    config = composed.config
    ladder = resolve_ladder(
        config, world_size, begun=begun_train(config, target.folder, target.name)
    )
    check_fits(config, ladder)
    tried: list[Candidate] = []
    candidate = skip_failed(ladder, history, config, tried)
    if candidate is None and is_new:
        raise DoesNotFitError(
            "the last start ran out of memory, and no rung below would need less of it (history"
            f" in {target.folder / layout.PLAN}); take a smaller data.max_seq_length, more ranks,"
            " or offload.nvme_path=/folder/on/a/local/disk. The same command tries the last rung"
            " again"
        )
    # Where nothing is left below, the memory may have been another program's.
    candidate = candidate or tried[-1]
    if candidate is not ladder.chosen:
        console.say(f"out of memory before (plan.json); taking the rung {candidate.describe()}")
    return plan_candidate(config, ladder, candidate, launched=True)


def _as_answer(error: Exception) -> dict[str, Any]:
    known = to_user_error(error)
    if known is None:
        return {"error": f"{type(error).__name__}: {error}", "code": 1}
    return {"error": str(known), "code": known.exit_code}


def _finish_first(composed: Composed, target: RunTarget, console: Console) -> None:
    from llmtune.run.finish import finished_message, maybe_export, recorded_end

    console.say(finished_message(target.folder))
    with (
        Status(console, "ending the run"),
        raise_stops(NOT_EXPORTED),
        recorded_end(target.folder, composed.config, console.say),
    ):
        maybe_export(target.folder, composed.config.export, console)

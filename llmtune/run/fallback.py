"""Run training attempts: restart after a rank failure, take the next rung after out-of-memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.checkpoint.find import find_checkpoints
from llmtune.config.best_model import resolve_best_model
from llmtune.config.groups.zero import OffloadDevice
from llmtune.errors import DoesNotFitError, LlmtuneError
from llmtune.launch.launchers.environment import restored_environment
from llmtune.launch.preflight.deepspeed_ops import ensure_ops
from llmtune.launch.preflight.nvme import hold_swap_folder, probe_nvme, swap_folder
from llmtune.launch.supervise.attempt import run_ranks
from llmtune.launch.supervise.out_of_memory import MemoryEvent, RanOutOfMemoryError
from llmtune.launch.supervise.outcome import RanksFailedError
from llmtune.launch.supervise.rank_group import RankGroup
from llmtune.launch.supervise.restarts import Restarts
from llmtune.launch.supervise.signals import raise_stops
from llmtune.launch.supervise.supervisor import Limits
from llmtune.plan.ladder import failure_conditions, next_candidate
from llmtune.plan.plan import with_nvme
from llmtune.plan.resolve import plan_candidate
from llmtune.plan.run_record import MemoryFailure
from llmtune.run.attempt import attempt
from llmtune.run.describe import describe
from llmtune.run.finish import recorded_failure
from llmtune.run.ranks_ahead import RanksAhead, Surroundings
from llmtune.storage import layout
from llmtune.storage.rank_files import FinishedRecord, RestartRecord
from llmtune.track.status import Status
from llmtune.track.webhook import tell_webhook

if TYPE_CHECKING:
    from llmtune.config.composed import Composed
    from llmtune.config.schema import Config
    from llmtune.plan.ladder import Candidate, Ladder
    from llmtune.plan.plan import Plan
    from llmtune.run.attempt import RunInputs, RunTarget
    from llmtune.track.console import Console
    from llmtune.train.request import RunRequest
    from llmtune.train.run_folder import RunFolder

    PrepareRun = Callable[[Composed, Plan, RunTarget, RunFolder, Console], RunInputs]


class FallbackRunner:
    """Trains one run to its end, on the first rung of the ladder that holds it."""

    def __init__(
        self,
        composed: Composed,
        ladder: Ladder,
        target: RunTarget,
        folder: RunFolder,
        console: Console,
        prepare: PrepareRun,
        ahead: RanksAhead | None = None,
    ):
        """
        Args:
            prepare: Prepares the inputs of all attempts, at the first one:
                :func:`llmtune.run.prepare.prepare_run`.
            ahead: Where ranks of the first attempt may wait already.
        """
        self._ahead = ahead
        self.composed = composed
        self.ladder = ladder
        self.target = target
        self.folder = folder
        self.console = console
        self._prepare_run = prepare
        self.inputs: RunInputs | None = None
        """Prepared at the first attempt, and the same for all."""
        self.history = folder.read_record().history
        self.tried: list[Candidate] = []
        self.restarts = Restarts(composed.config.launch.max_restarts)
        self.at_limit: MemoryEvent | None = None
        """Memory that may have run out in the last attempt."""

    def run(self) -> bool:
        """Train until the end, on whatever rung; False if the run was finished already.

        Raises:
            DoesNotFitError: No rung is left, or the one that was asked for is not enough.
            StoppedError: A signal came.
            LlmtuneError: The error that ended the ranks, where another attempt would not help.
        """
        candidate = self._first()
        failure: RanOutOfMemoryError | RanksFailedError | None = None
        with ExitStack() as stack:
            while (request := self._prepare(candidate)) is not None:
                if failure is None:
                    # From here on, the folder is this start's.
                    stack.enter_context(Status(self.console, "ending the run"))
                    stack.enter_context(
                        recorded_failure(self.folder.path, self.composed.config, self.console.say)
                    )
                if isinstance(failure, RanksFailedError):
                    self._record_restart(failure, request)
                self.console.page("llmtune", describe(request))
                try:
                    run_request(request, self.console, self._take_ranks_ahead())
                    return True
                except (RanOutOfMemoryError, RanksFailedError) as error:
                    failure = error
                stack.enter_context(
                    raise_stops("stopped between two attempts; the same command resumes")
                )

                # Out of memory: take the next rung. Any other failure of a rank: wait, and restart.
                event = self._memory_event(failure)
                if event is not None:
                    candidate = self._next(candidate, event)
                else:
                    assert isinstance(failure, RanksFailedError)
                    self._wait_for_restart(failure, request)
                self._resume_own_work(request.resume_from)
        return False

    def _memory_event(self, failure: RanOutOfMemoryError | RanksFailedError) -> MemoryEvent | None:
        """Find memory that ran out: reported, or ranks ended at their limit twice in a phase."""
        if isinstance(failure, RanOutOfMemoryError):
            return failure.event
        before, self.at_limit = self.at_limit, failure.at_limit
        if before is None or self.at_limit is None or before.phase != self.at_limit.phase:
            return None
        return replace(self.at_limit, message=f"{failure.reason}, twice within reach of its limit")

    def _prepare(self, candidate: Candidate) -> RunRequest | None:
        plan = place_swap(
            plan_candidate(self.composed.config, self.ladder, candidate), self.composed, self.target
        )
        if self._ahead is not None:
            self._ahead.start(Surroundings.of(plan))
        with Status(self.console, "preparing the model and the data"):
            if self.inputs is None:
                self.inputs = self._prepare_run(
                    self.composed, plan, self.target, self.folder, self.console
                )
                resume_from = self.inputs.resume_from
            else:
                resume_from = self.inputs.find_checkpoint(self.console)
            return attempt(self.inputs, plan, resume_from, self.console, self.history)

    def _take_ranks_ahead(self) -> RankGroup | None:
        """Return the ranks that wait, once: a further attempt may be on another rung."""
        ahead, self._ahead = self._ahead, None
        return ahead.take() if ahead is not None else None

    def _wait_for_restart(self, failure: RanksFailedError, request: RunRequest) -> None:
        wait_seconds = self.restarts.take(failure, _step(request.resume_from))
        newest = self._newest_checkpoint()
        where = newest.name if newest else "the beginning"
        self.console.say(
            f"{failure.reason}; starting again from {where}{self.restarts.describe(wait_seconds)}"
        )
        self._tell("restart", f"{failure.reason}; starting again from {where}.")
        with Status(self.console, "waiting to start again"):
            time.sleep(wait_seconds)

    def _tell(self, event: str, message: str) -> None:
        """Tell ``tracker.webhook`` while the next attempt begins."""
        tell_webhook(
            self.composed.config.tracker.webhook,
            self.folder.path,
            event,
            message,
            0.0,
            self.console.say,
        )

    def _record_restart(self, failure: RanksFailedError, request: RunRequest) -> None:
        record = RestartRecord(
            time=time.time(),
            reason=failure.reason,
            step=failure.step,
            resumed_from=request.resume_from.name if request.resume_from else None,
            rollback=failure.rollback,
        )
        # It is for people; the run does not depend on it.
        with suppress(OSError):
            record.append(self.folder.path)

    def _resume_own_work(self, began_from: Path | None) -> None:
        """Resume this run's newest checkpoint from now on, wherever the command said to begin."""
        assert self.inputs is not None
        has_saved = _step(self._newest_checkpoint()) > _step(began_from)
        if self.composed.config.resume_from_checkpoint == "none" or has_saved:
            self.inputs = self.inputs.resuming_own_work()

    def _newest_checkpoint(self) -> Path | None:
        found = find_checkpoints(self.folder.path)
        return found[-1] if found else None

    def _first(self) -> Candidate:
        """Return the ladder's choice, or the rung of an earlier start on the same hardware."""
        chosen = self.ladder.chosen
        assert chosen is not None
        found = skip_failed(self.ladder, self.history, self.composed.config, self.tried)
        if found is None:
            # Nothing is left below. The memory may have been another program's.
            return self.tried[-1]
        if found is chosen:
            return chosen
        self.console.say(
            f"{chosen.placement.rung} ran out of memory before (plan.json): starting lower"
        )
        return found

    def _next(self, failed: Candidate, event: MemoryEvent) -> Candidate:
        # The failure is recorded at once, so that later starts do not try this candidate again.
        self.tried.append(failed)
        entry = MemoryFailure(
            candidate=failed.key,
            conditions=self._conditions(),
            time=time.time(),
            **asdict(event),
        )
        self.history = (*self.history, entry)
        self.folder.write_record(replace(self.folder.read_record(), history=self.history))

        # The next rung, where the user left the choice open.
        if not self._may_move:
            raise DoesNotFitError(self._refusal(failed, event))
        following = next_candidate(self.ladder, failed, self.tried, event.phase, event.pool)
        if following is None:
            raise DoesNotFitError(
                f"{event.describe()}\non {failed.describe()}, and no rung below it would need less"
                f" of that memory.\n{_hint(self.composed.config)}"
            )
        self.console.say(f"{event.describe()}")
        self.console.say(f"taking the next rung: {following.describe()}")
        self._tell("fallback", f"{event.describe()} Taking {following.describe()}.")
        return following

    @property
    def _may_move(self) -> bool:
        return may_move(self.composed.config)

    def _refusal(self, failed: Candidate, event: MemoryEvent) -> str:
        rung = failed.placement.rung
        others = [
            c for c in self.ladder.rungs if c.candidate and c.candidate.fits and c.name != rung
        ]
        named = " or ".join(f"offload={other.name}" for other in others[:3])
        return (
            f"{event.describe()}\noffload={rung} was asked for, so no other rung was tried. Take"
            " offload=auto, which goes down the ladder by"
            f" itself{f' (here: {named})' if named else ''}. The same command with it resumes from"
            f" the newest checkpoint.\n{_hint(self.composed.config)}"
        )

    def _conditions(self) -> dict[str, Any]:
        """Return the conditions under which an earlier failure counts."""
        limit = self.composed.config.launch.memory_limit
        return failure_conditions(self.ladder.hardware, self.ladder.world_size, limit)


def may_move(config: Config) -> bool:
    """Tell whether the user left the choice of the rung open."""
    return config.offload.optimizer is OffloadDevice.auto


def skip_failed(
    ladder: Ladder,
    history: tuple[MemoryFailure, ...],
    config: Config,
    tried: list[Candidate] | None = None,
) -> Candidate | None:
    """Return the ladder's choice, or the candidate below those that ran out of memory before.

    Args:
        history: In the order of their time.
        tried: Gets the candidates that failed.

    Returns:
        None where no candidate below is left. A rung that the user named is not left.
    """
    candidate, tried = ladder.chosen, [] if tried is None else tried
    limit = config.launch.memory_limit
    for entry in history if may_move(config) else ():
        if candidate is None:
            break
        conditions = failure_conditions(ladder.hardware, ladder.world_size, limit)
        if entry.conditions == conditions and entry.candidate == candidate.key:
            tried.append(candidate)
            candidate = next_candidate(ladder, candidate, tried, entry.phase, entry.pool)
    return candidate


def place_swap(plan: Plan, composed: Composed, target: RunTarget) -> Plan:
    """Return the plan with this run's own folder on NVMe."""
    path = composed.config.offload.nvme_path
    if not plan.placement.uses_nvme or path is None:
        return plan
    return with_nvme(plan, str(swap_folder(path, target.folder)))


@contextmanager
def hold_nvme(config: Config, plan: Plan, run_folder: Path, console: Console) -> Iterator[None]:
    """Check the disk of a run that uses NVMe, and hold its swap folder during the block."""
    path = config.offload.nvme_path
    if not plan.placement.uses_nvme or path is None:
        yield
        return
    kept = (config.train.save_total_limit or 2) + (resolve_best_model(config) is not None)
    swap = plan.memory.nvme * plan.world_size
    probe_nvme(path, swap, (kept + 1) * plan.memory.checkpoint, run_folder, console.say)
    with hold_swap_folder(swap_folder(path, run_folder)):
        yield


def run_request(request: RunRequest, console: Console, ahead: RankGroup | None = None) -> None:
    """Run the ranks of one attempt to their end.

    Args:
        ahead: Ranks that were started ahead, which are told what to do.
    """
    plan = request.plan
    log = request.run_folder / layout.LOG
    with (
        restored_environment(),
        tempfile.TemporaryDirectory(prefix="llmtune-") as folder,
        Status(console, "preparing the ranks"),
        hold_nvme(request.config, plan, request.run_folder, console),
    ):
        # Variables and compiled ops before the ranks, which inherit or load them.
        Surroundings.of(plan).set_variables()
        ensure_ops(plan.hardware.accelerator, plan.placement, console.say)
        path = Path(folder) / "request.json"
        path.write_text(request.to_json())
        limits = Limits(request.config.launch.hang_timeout, request.config.launch.stop_timeout)
        command = ["-m", "llmtune.run.rank", str(path)]
        show = partial(Status, console)
        run_ranks(command, plan.world_size, log, console.say, limits, ahead, show)
    if FinishedRecord.read(request.run_folder) is None:
        raise LlmtuneError(
            f"all ranks ended without an error, but the run is not finished; see {log}"
        )


def _step(checkpoint: Path | None) -> int:
    return (layout.checkpoint_step(checkpoint) or 0) if checkpoint else 0


def _hint(config: Config) -> str:
    hints = ["a smaller data.max_seq_length"]
    if config.offload.nvme_path is None:
        hints.insert(0, "offload.nvme_path=/path on a local disk")
    if config.launch.memory_limit is not None:
        hints.insert(0, f"a launch.memory_limit above {config.launch.memory_limit}")
    return "Try: " + "; ".join(hints)

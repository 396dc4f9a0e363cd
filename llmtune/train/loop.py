"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from llmtune.checkpoint.best import ends_early, update_best
from llmtune.config.best_model import BestModel
from llmtune.config.groups.schedule import ScheduleConfig
from llmtune.config.groups.train import TrainConfig
from llmtune.data.load.loader import StepBatch, Steps
from llmtune.draws import Draw, torch_seed
from llmtune.engine.distributed import Rank, broadcast_object
from llmtune.engine.train_module import StepResult, TrainModule
from llmtune.errors import CheckpointError, DivergedError, StoppedError
from llmtune.plan.length.batch_schedule import BatchSchedule
from llmtune.plan.steps import Interval, StepsPlan
from llmtune.storage.manifest import is_complete
from llmtune.track.phase_seconds import to_record
from llmtune.track.tracker import Record, Trackers
from llmtune.track.utilization import Utilization
from llmtune.train.divergence import DivergenceMonitor
from llmtune.train.hooks.evaluation import Evaluator
from llmtune.train.hooks.gradient_check import GradientCheck
from llmtune.train.hooks.rank_seconds import RankSeconds
from llmtune.train.line_sums import LineSums
from llmtune.train.memory_usage import used_memory_bytes
from llmtune.train.schedule import learning_rate_at
from llmtune.train.stop_request import Stop
from llmtune.train.training_state import TrainingState


class Hook(Protocol):
    """Something done beside training, at the run's start and end."""

    def on_start(self, progress: TrainingState) -> None:
        """Run before the first step, on every rank."""

    def on_end(self, progress: TrainingState) -> None:
        """Run after the last step, on every rank."""


class Saver(Protocol):
    """Saves checkpoints; :class:`llmtune.train.checkpointing.CheckpointSaver` in a run.

    All ranks call its methods in the same order.
    """

    @property
    def is_writing(self) -> bool:
        """Tell whether this rank still writes a checkpoint in the background."""

    @property
    def has_failed(self) -> bool:
        """Tell whether this rank knows that the save in progress has failed."""

    def prepare(self, steps_to_come: int) -> None:
        """Check the room for all checkpoints, before the first step."""

    def record_evaluation(self, record: Record) -> None:
        """Record an evaluation, for the next checkpoint."""

    def save(self, progress: TrainingState) -> Path:
        """Begin to write the checkpoint of a step, and return its folder."""

    def finish(self) -> None:
        """Wait for the save in progress."""

    def pause_seconds(self) -> float | None:
        """Return how long saves stopped training since the last call; None without a save."""

    def publish_result(self, progress: TrainingState) -> Path:
        """Publish the trained model, mark the run's end, and return the model's folder."""

    def close(self, timeout_seconds: float) -> None:
        """Wait for copies that are made elsewhere."""


@dataclass(slots=True, kw_only=True)
class Job:
    """Everything that the loop uses, built by ``build.py``."""

    rank: Rank
    module: TrainModule
    loader: Steps
    steps: StepsPlan
    batches: BatchSchedule
    train: TrainConfig
    learning_rate: float
    """The peak rate, for steps as large as the first."""
    schedule: ScheduleConfig
    seed: int
    evaluations: Interval
    saves: Interval
    best: BestModel | None
    """The rule by which the best model is chosen, and training ends early; None without one."""
    evaluator: Evaluator
    saver: Saver
    divergence: DivergenceMonitor
    trackers: Trackers
    hooks: list[Hook]
    stop: Stop
    start: TrainingState
    ranks: RankSeconds
    utilization: Utilization = field(default_factory=Utilization)
    gradients: GradientCheck | None = None
    """Looks for trained tensors that no gradient reaches."""
    trace_step: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext()
    """Makes the context in which a step is done, by its number."""


def run(job: Job) -> TrainingState:
    """Train from the job's start to its last step, or until no evaluation improves any more.

    Raises:
        StoppedError: A stop was requested; the state was saved.
        DivergedError: A loss or gradient is not finite.
        CheckpointError: A checkpoint could not be written.
    """
    # Before the first step: room on the disk, hooks, signal handlers, and the evaluation of step 0.
    progress, last = job.start, job.steps.total_steps
    job.saver.prepare(progress.step)
    for hook in job.hooks:
        hook.on_start(progress)
    job.stop.arm()
    if progress.step == 0 or progress.evaluation_due:
        progress = evaluate(job, progress)
    if is_new_best(job, progress):
        # The checkpoint that the run resumes from lacks this evaluation, or is another run's.
        job.saver.save(progress)

    # The steps. All ranks take the same branches, because ``agree`` is collective.
    batches = job.loader.from_position(
        progress.data_position, last - progress.step, progress.reached
    )
    while progress.step < last and not ends_early(job.best, progress.best):
        with job.trace_step(progress.step + 1):
            progress = train_step(job, progress, batches)
        job.ranks.after_step()
        if job.evaluations.is_due(progress.step):
            progress = evaluate(job, progress)
        if job.saves.is_due(progress.step) or is_new_best(job, progress):
            job.saver.save(progress)
        stop, failed, writing = job.stop.agree(job.saver.has_failed, job.saver.is_writing)
        if failed or not writing:
            job.saver.finish()
        if stop and progress.step < last:
            save_and_stop(job, progress)

    # The end: the last evaluation and checkpoint, then the result.
    if progress.step == last > job.start.step:
        progress = evaluate(job, progress)
    job.saver.save(progress)
    job.saver.finish()
    # Before the hooks: a plot that cannot be drawn must not make a trained model unfinished.
    job.saver.publish_result(progress)
    if job.best is not None:
        job.trackers.summarize(progress.best.summarize(job.best))
    for hook in job.hooks:
        hook.on_end(progress)
    return progress


def train_step(job: Job, progress: TrainingState, batches: Iterator[StepBatch]) -> TrainingState:
    """Run one optimizer step, and log a line of ``metrics.jsonl`` when one is due.

    All ranks run it together; only rank 0 has trackers.
    """
    # The batch and the learning rate of this step.
    started = time.perf_counter()
    step = progress.step + 1
    job.rank.phases.step = step
    job.rank.phases.enter("data")
    batch = next(batches)
    batch_size = job.batches.rows_at(progress.reached)
    rate = learning_rate_at(
        progress.step - progress.skipped,
        job.steps,
        job.learning_rate * job.batches.rate_factor(batch_size),
        job.schedule,
    )

    # Forward pass, backward pass and optimizer step.
    result = _run_step(job, progress, batch, rate)
    if job.gradients is not None:
        job.gradients.after_step(rate, result.applied)

    # The record of this step; a line sums up all steps since the last one.
    seconds = time.perf_counter() - started
    line = progress.line.add(step, result.loss, batch.loss_weight, result.applied)
    record: dict[str, Any] = {
        "step": step,
        **line.to_record(result.loss),
        "grad_norm": result.grad_norm,
        "learning_rate": rate,
        "tokens": batch.tokens,
        "tokens_per_second": batch.tokens / seconds,
        **job.utilization.shares(batch.tokens / seconds),
        "seconds": seconds,
        "memory_bytes": used_memory_bytes(job.rank.device),
    }
    if job.train.batch_schedule is not None:
        record["batch_size"] = batch_size
    if step % job.train.logging_steps == 0 or step == job.steps.total_steps:
        pause = job.saver.pause_seconds()
        if pause is not None:
            record["save_pause_seconds"] = pause
        record |= to_record(job.rank.phases.clock.take()) | job.ranks.take()
        job.trackers.log(record)
        line = LineSums()

    # The next state. The schedule does not count steps that changed nothing.
    skipped = progress.skipped + (not result.applied)
    return TrainingState(
        step=step,
        tokens=progress.tokens + batch.tokens,
        skipped=skipped,
        data_position=batch.position,
        best=progress.best,
        line=line,
    )


def _run_step(
    job: Job, progress: TrainingState, batch: StepBatch, learning_rate: float
) -> StepResult:
    """Run the step of a batch, unless a rollback left it out.

    Raises:
        StoppedError: A stop was requested between two micro-batches; the state before was saved.
        DivergedError: The step diverged; the state before was saved.
    """
    step = progress.step + 1
    if step in job.divergence.skipped_steps:
        return StepResult(float("nan"), float("nan"), applied=False)
    # Dropout is a function of seed, step and rank, so that a resumed run draws the same.
    # Not by torch.manual_seed, which looks for every kind of device there is.
    draw = (job.seed, Draw.dropout, progress.step, job.rank.rank)
    torch.default_generator.manual_seed(torch_seed(*draw))
    if job.rank.device.type != "cpu":
        torch.get_device_module(job.rank.device).manual_seed(torch_seed(*draw))
    result = job.module.train_step(
        batch.micro_batches, batch.loss_weight, learning_rate, job.stop.requested
    )
    if result is None:
        save_and_stop(job, progress)
    try:
        job.divergence.check(step, batch, result)
    except DivergedError as error:
        save_before(job, progress, error)
    return result


def evaluate(job: Job, progress: TrainingState) -> TrainingState:
    """Log the held-out metrics, and compare them with the best so far.

    A stop during the evaluation saves the state and ends the run; a resume evaluates first.

    Raises:
        ConfigError: The evaluation does not have the metric that chooses the best model.
    """
    record = job.evaluator.evaluate(progress, job.stop.requested)
    if record is not None:
        # All ranks decide by the same digits.
        record = broadcast_object(record, job.rank)
        job.saver.record_evaluation(record)
        job.trackers.log(record)
        progress = replace(progress, best=update_best(job.best, progress.best, record))
        is_published = job.best is None or not job.best.load_at_end
        if is_published or progress.best.step == progress.step:
            job.evaluator.write_table()
    elif job.stop.requested():
        save_and_stop(job, replace(progress, evaluation_due=True))
    return replace(progress, evaluation_due=False)


def save_and_stop(job: Job, progress: TrainingState) -> NoReturn:
    """Save the state, and end the run.

    Raises:
        StoppedError: Always.
    """
    if progress.step == 0:
        raise StoppedError("stopped before the first step was done; the same command starts again")
    folder = job.saver.save(progress)
    job.saver.finish()
    if not is_complete(folder):
        raise StoppedError(
            f"stopped after step {progress.step}, which was not saved"
            " (checkpoint.on_disk_low=skip): the same command resumes from the newest checkpoint"
        )
    raise StoppedError(
        f"stopped after step {progress.step} and saved {folder}: the same command resumes from"
        " there"
    )


def save_before(job: Job, progress: TrainingState, error: DivergedError) -> NoReturn:
    """Save the state before a step that diverged, and end the run with that step's error.

    The step changed nothing, so that the state in memory is the one before it.

    Raises:
        DivergedError: Always.
    """
    try:
        saved = "No step was done before"
        if progress.step:
            folder = job.saver.save(progress)
            job.saver.finish()
            saved = "The state before it was not saved"
            if is_complete(folder):
                saved = f"The state before it is {folder}"
    except CheckpointError as damage:
        saved = f"The state before it is not worth saving: {damage}"
    raise DivergedError(
        f"{error}.\n{saved}. Fix the rows, lower optim.learning_rate, or start the same command"
        " with train.on_nan=skip or train.on_nan=rollback"
    ) from error


def is_new_best(job: Job, progress: TrainingState) -> bool:
    """Tell whether the best evaluation so far is that of this step, and is to be kept."""
    return job.best is not None and job.best.is_saved and progress.best.step == progress.step

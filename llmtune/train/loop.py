"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from llmtune.config.schema import ScheduleConfig, TrainConfig
from llmtune.data.loader import StepBatch, Steps
from llmtune.engine.distributed import Rank
from llmtune.engine.module import TrainModule
from llmtune.errors import StoppedError
from llmtune.plan.resolve import StepsPlan
from llmtune.track.tracker import Record, Trackers
from llmtune.train.memory import used_memory_bytes
from llmtune.train.schedule import learning_rate_at
from llmtune.train.stop import StopFlag


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the run stands."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens seen, padding excluded."""
    data_position: Mapping[str, Any] | None = None
    """Where the data goes on, as the loader says it; None at the beginning."""


class Hook(Protocol):
    """A side concern of rank 0 and the others, which sees the run begin and end."""

    def on_start(self, progress: Progress) -> None:
        """Before the first step. Called on every rank."""

    def on_end(self, progress: Progress) -> None:
        """After the last step. Called on every rank."""


class Evaluator(Protocol):
    """Held-out loss. Collective."""

    def evaluate(self, progress: Progress) -> Record | None:
        """A record with ``eval_loss``, or None where nothing is held out."""


class Saver(Protocol):
    """Checkpoints. Collective."""

    def save(self, progress: Progress) -> Path:
        """Write and publish one, unless it is there."""

    def publish_result(self, progress: Progress) -> Path:
        """The trained model under its final name, and the mark that the run is finished."""


@dataclass(slots=True)
class Job:
    """Everything the loop touches, built by ``job.py``."""

    rank: Rank
    module: TrainModule
    loader: Steps
    steps: StepsPlan
    train: TrainConfig
    learning_rate: float
    """Peak."""
    schedule: ScheduleConfig
    seed: int
    evaluator: Evaluator
    saver: Saver
    trackers: Trackers
    hooks: list[Hook]
    stop: StopFlag
    start: Progress


def run(job: Job) -> Progress:
    """Train from where the job stands to its last step.

    Raises:
        StoppedError: A signal asked for an end; the state was saved.
    """
    progress = job.start
    for hook in job.hooks:
        hook.on_start(progress)
    if progress.step == 0:
        evaluate(job, progress)

    batches = job.loader.from_position(progress.data_position, job.steps.total_steps - progress.step)
    while progress.step < job.steps.total_steps:
        progress, record = train_step(job, progress, batches)
        if progress.step % job.train.logging_steps == 0 or progress.step == job.steps.total_steps:
            job.trackers.log(record)
        if is_due(job.train.eval_steps, progress.step, job.steps.total_steps):
            evaluate(job, progress)
        if is_due(job.train.save_steps, progress.step, job.steps.total_steps):
            job.saver.save(progress)
        if job.stop.requested(job.rank) and progress.step < job.steps.total_steps:
            folder = job.saver.save(progress)
            raise StoppedError(
                f"stopped after step {progress.step} and saved {folder}: the same command goes on from there"
            )

    if progress.step > job.start.step:
        evaluate(job, progress)
    job.saver.save(progress)
    # Before the hooks: a plot that cannot be drawn must not make a trained model unfinished.
    job.saver.publish_result(progress)
    for hook in job.hooks:
        hook.on_end(progress)
    return progress


def train_step(job: Job, progress: Progress, batches: Iterator[StepBatch]) -> tuple[Progress, Record]:
    """One optimizer step, and its line of ``metrics.jsonl``."""
    started = time.perf_counter()
    job.rank.phases.step = progress.step + 1
    # Dropout depends on seed, step and rank alone, so that a resumed run draws the same.
    torch.manual_seed(hash((job.seed, progress.step, job.rank.rank)) % 2**63)
    batch = next(batches)
    rate = learning_rate_at(
        progress.step,
        job.steps.total_steps,
        job.steps.warmup_steps,
        job.learning_rate,
        job.schedule.lr_scheduler_type,
    )
    result = job.module.train_step(batch.micro_batches, batch.trained_tokens, rate)
    seconds = time.perf_counter() - started
    progress = Progress(progress.step + 1, progress.tokens + batch.tokens, batch.position)
    record: dict[str, Any] = {
        "step": progress.step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": rate,
        "tokens": batch.tokens,
        "tokens_per_second": batch.tokens / seconds,
        "seconds": seconds,
        "memory_bytes": used_memory_bytes(job.rank.device),
    }
    if not result.applied:
        record["skipped"] = True
    return progress, record


def evaluate(job: Job, progress: Progress) -> None:
    """Held-out loss, logged."""
    record = job.evaluator.evaluate(progress)
    if record is not None:
        job.trackers.log(record)


def is_due(every: int | None, step: int, last: int) -> bool:
    """Whether something periodic happens after ``step``; what happens at the end happens once, there."""
    return every is not None and step % every == 0 and step < last

"""The real loop over evaluations that a test names, without a model: what it saves, and where it
ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from llmtune.checkpoint.resume_best import resume_best
from llmtune.checkpoint.retention import CheckpointInfo, Retention
from llmtune.checkpoint.trainer_state import TrainerState
from llmtune.config.best_model import BestModel
from llmtune.config.groups.schedule import ScheduleConfig
from llmtune.config.groups.train import TrainConfig
from llmtune.data.load.loader import StepBatch
from llmtune.engine.distributed import Rank
from llmtune.engine.train_module import StepResult
from llmtune.plan.length.batch_schedule import BatchSchedule
from llmtune.plan.steps import StepsPlan, evaluation_interval, save_interval
from llmtune.track.tracker import Record
from llmtune.train.hooks.rank_seconds import RankSeconds
from llmtune.train.loop import Job, run
from llmtune.train.training_state import TrainingState

RANK = Rank(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


class Killed(Exception):  # noqa: N818 - it is no error of the program
    """The process ended here."""


@dataclass
class Disk:
    """What is on the disk of a run, and survives a kill."""

    retention: Retention
    states: dict[int, TrainerState] = field(default_factory=dict)
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    evaluations: list[int] = field(default_factory=list)
    """Steps of all evaluations, those before a kill included."""
    result: TrainingState | None = None
    summary: Record = field(default_factory=dict)

    def checkpoints(self) -> list[CheckpointInfo]:
        """Those that are complete, oldest first."""
        return [
            CheckpointInfo(Path(f"checkpoint-{step}"), step, self.metrics[step])
            for step in sorted(self.states)
        ]

    def write(self, step: int, state: TrainerState, metrics: dict[str, float]) -> None:
        """Add a checkpoint, and remove those that retention does not keep."""
        self.states[step], self.metrics[step] = state, metrics
        for checkpoint in self.retention.to_remove(self.checkpoints()):
            del self.states[checkpoint.step], self.metrics[checkpoint.step]


class Saver:
    """In the place of ``CheckpointSaver``: saves to a :class:`Disk` at once."""

    has_failed = is_writing = False

    def __init__(self, disk: Disk, best: BestModel | None, after_save: Callable[[], None]):
        self.disk, self.best, self.after_save = disk, best, after_save
        self.record: Record = {}
        self.newest = max(disk.states, default=None)

    def record_evaluation(self, record: Record) -> None:
        self.record = record
        if self.newest == record["step"]:
            self.newest = None

    def save(self, progress: TrainingState) -> Path:
        folder = Path(f"checkpoint-{progress.step}")
        if progress.step == self.newest:
            return folder
        state = TrainerState(
            step=progress.step,
            tokens=progress.tokens,
            skipped=0,
            data_fingerprint="",
            data_position=None,
            evaluation_due=progress.evaluation_due,
            best=progress.best.describe(self.best),
            best_goal=self.best.goal if self.best is not None else None,
            stale_evaluations=progress.best.stale,
        )
        # By way of its file.
        state = TrainerState(**json.loads(state.to_json()))
        here = self.record.get("step") == progress.step
        self.disk.write(progress.step, state, dict(self.record) if here else {})
        self.newest = progress.step
        self.after_save()
        return folder

    def publish_result(self, progress: TrainingState) -> None:
        self.disk.result = progress

    def prepare(self, step: int) -> None: ...

    def finish(self) -> None: ...

    def pause_seconds(self) -> None: ...


def train(
    disk: Disk,
    best: BestModel | None,
    config: TrainConfig,
    steps: StepsPlan,
    evaluations: Mapping[int, float],
    kill_after: int | None = None,
    interrupt_at: int | None = None,
    after_save: Callable[[], None] = lambda: None,
) -> None:
    """One start of a run: from its newest checkpoint to its end.

    Args:
        evaluations: The metric ``eval_loss`` by step; others are 1.0.
        kill_after: The step during which the process is killed.
        interrupt_at: The step whose evaluation a stop interrupts.

    Raises:
        Killed: There.
        StoppedError: There.
    """
    start = TrainingState()
    if disk.states:
        state = disk.states[max(disk.states)]
        start = TrainingState(
            step=state.step,
            evaluation_due=state.evaluation_due,
            best=resume_best(best, state, disk.checkpoints()),
        )
    is_stopped = False

    def evaluate(progress: TrainingState, _: object) -> Record | None:
        nonlocal is_stopped
        if progress.step == interrupt_at:
            is_stopped = True
            return None
        disk.evaluations.append(progress.step)
        return {"step": progress.step, "eval_loss": evaluations.get(progress.step, 1.0)}

    def step(*_: object) -> StepResult:
        if RANK.phases.step == kill_after:
            raise Killed
        return StepResult(1.0, 1.0, True)

    def batches(_: object, count: int, __: object) -> Iterator[StepBatch]:
        for _number in range(count):
            yield StepBatch(micro_batches=[], loss_weight=1, tokens=1, position={})

    stands_in: Any = SimpleNamespace
    job = Job(
        rank=RANK,
        module=stands_in(train_step=step),
        loader=stands_in(from_position=batches),
        steps=steps,
        batches=BatchSchedule(((0, 1),)),
        train=config,
        learning_rate=1.0,
        schedule=ScheduleConfig(),
        seed=1,
        evaluations=evaluation_interval(config, steps),
        saves=save_interval(config, steps),
        best=best,
        evaluator=stands_in(evaluate=evaluate, write_table=lambda: None),
        saver=Saver(disk, best, after_save),  # type: ignore[arg-type]
        divergence=stands_in(skipped_steps=(), check=lambda *_: None),
        trackers=stands_in(log=lambda _: None, summarize=disk.summary.update),
        hooks=[],
        stop=stands_in(
            arm=lambda: None, requested=lambda: is_stopped, agree=lambda *_: [False, False, False]
        ),
        start=start,
        ranks=RankSeconds(RANK),
    )
    run(job)

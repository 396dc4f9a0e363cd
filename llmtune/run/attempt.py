"""Name a run, and describe an attempt: its request for the ranks, its record in the folder."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from llmtune.checkpoint.trainer_state import read_trainer_state
from llmtune.config.best_model import resolve_best_model
from llmtune.config.composed import Composed
from llmtune.config.schema import Config
from llmtune.data.prepared_data import PROBLEMS
from llmtune.data.read.parse_sources import parse_sources
from llmtune.errors import CheckpointError
from llmtune.plan.plan import Plan
from llmtune.plan.prepared_data import PreparedData
from llmtune.plan.run_record import MemoryFailure, RunRecord
from llmtune.plan.steps import StepsPlan
from llmtune.run.check_model import check_quantized
from llmtune.storage import layout
from llmtune.task.labels import Labels
from llmtune.track.console import Console
from llmtune.train.mirror_owner import withdraw_left_copies
from llmtune.train.request import RunRequest
from llmtune.train.resume import began_from, resume_point
from llmtune.train.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class RunTarget:
    """Name and folder of a run."""

    name: str
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """The inputs of every attempt of a command, checked and prepared once."""

    config: Config
    """The config, with the planned ``train.global_batch_size``."""
    overrides: list[str]
    """The overrides as they were typed."""
    target: RunTarget
    folder: RunFolder
    run_id: str
    """Id that marks the run's folder at ``checkpoint.mirror``."""
    model_folder: Path
    data: PreparedData
    labels: Labels
    """The classes that the model is to tell apart; none for language modeling."""
    steps: StepsPlan
    resume_from: Path | None
    """The checkpoint that the first attempt resumes; None for a new run."""

    def find_checkpoint(self, console: Console) -> Path | None:
        """Find the checkpoint that a further attempt resumes.

        Raises:
            CheckpointError: All are damaged, or the one that was named is.
        """
        return resume_point(self.folder, self.config, self.target.name, console.say)

    def resuming_own_work(self) -> RunInputs:
        """Return the same inputs, which resume the run's own newest checkpoint."""
        return replace(self, config=replace(self.config, resume_from_checkpoint="auto"))


def attempt(
    inputs: RunInputs,
    plan: Plan,
    resume_from: Path | None,
    console: Console,
    history: tuple[MemoryFailure, ...] = (),
) -> RunRequest | None:
    """Write the run folder's description for one attempt; None when the run is finished.

    Args:
        history: Earlier attempts that ran out of memory.

    Raises:
        ConfigError: The model cannot be trained under this placement.
        CheckpointError: The checkpoint is of other rows or a longer run, or the disk refused.
    """
    config, folder, steps, data = inputs.config, inputs.folder, inputs.steps, inputs.data
    check_quantized(config, plan.placement.zero_stage, inputs.model_folder)
    if folder.is_finished(steps.total_steps, resolve_best_model(config)):
        return None

    # The record of this attempt, for ``plan.json``.
    step = _resolve_resume_step(resume_from, steps.total_steps, data.fingerprint)
    record = RunRecord.of_plan(
        plan,
        steps=steps,
        data=data,
        labels=inputs.labels.to_dict() if inputs.labels.kind else {},
        model_folder=inputs.model_folder,
        run_name=inputs.target.name,
        run_id=inputs.run_id,
        began_from=began_from(folder, config),
        history=history,
    )

    # The run folder describes the attempt, and loses what does not precede its first step.
    if resume_from is not None:
        first_left = folder.first_left(step, resume_from)
        withdraw_left_copies(config, inputs.target.name, inputs.run_id, first_left, console.say)
    for note in folder.begin(config, inputs.overrides, record, step, resume_from):
        console.say(note)
    if data.left_out:
        shutil.copyfile(Path(data.folder) / PROBLEMS, folder.path / layout.BAD_ROWS)
        console.say(
            f"{data.left_out} rows cannot be used and are left out: {folder.path / layout.BAD_ROWS}"
        )
    return RunRequest(
        config=config,
        plan=plan,
        steps=steps,
        data=data,
        labels=inputs.labels,
        run_folder=folder.path,
        run_name=inputs.target.name,
        model_folder=inputs.model_folder,
        resume_from=resume_from,
        run_id=inputs.run_id,
    )


def _resolve_resume_step(checkpoint: Path | None, total_steps: int, data_fingerprint: str) -> int:
    """Check that a checkpoint can be resumed; return its step, or -1 for a new run."""
    if checkpoint is None:
        return -1
    state = read_trainer_state(checkpoint)
    if state.data_fingerprint != data_fingerprint:
        raise CheckpointError(
            f"{checkpoint} was trained on other rows than data.train gives now; take its data, or"
            " start anew"
        )
    if state.step > total_steps:
        raise CheckpointError(
            f"{checkpoint} is at step {state.step}, beyond the {total_steps} steps of this run"
        )
    return state.step


def resolve_run_target(composed: Composed) -> RunTarget:
    """Resolve the run's name and folder.

    Without ``run_name`` the name is made of model, tuner and data, and of ZeRO where it was chosen.
    """
    config, choices = composed.config, composed.choices
    if config.run_name:
        name = config.run_name
    else:
        model = choices["model"]
        if model == "custom":
            model = Path(config.model.name_or_path).name.removesuffix(".gguf")
        data = choices["data"] if choices["data"] != "files" else _data_name(config)
        parts = [str(model), str(choices["tuner"]), str(data)]
        if choices.get("zero") not in (None, "auto"):
            parts.append(f"zero{choices['zero']}")
        if sweep_run := os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID"):
            # The runs of a sweep differ in their overrides only.
            parts.append(sweep_run)
        name = "-".join(parts)
    return RunTarget(name, Path(config.output_dir or f"runs/{name}").expanduser())


def lock_file(folder: RunFolder) -> Path:
    """Return the lock file of a run folder."""
    return folder.path / layout.LOCK


def _data_name(config: Config) -> str:
    """Return the name of the first file, without its ending."""
    path = parse_sources(config.data.train, "data.train", config.data.format)[0].path
    return Path(path.split("*")[0].rstrip("/")).name.split(".")[0] or "data"

"""Prepare a run before its ranks start: once per command, and once more per attempt.

The supervisor does it, and rank 0 under a launcher.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtune.checkpoint.trainer_state import read_trainer_state
from llmtune.config.cache_folder import open_cache
from llmtune.config.compose import Composed
from llmtune.config.schema import Config
from llmtune.data.load.count_steps import step_counter
from llmtune.data.prepare import prepare_data
from llmtune.data.prepared_data import PROBLEMS, open_rows
from llmtune.data.read.sources import parse_sources
from llmtune.data.rows.fields import describe_unknown_fields
from llmtune.data.store.vocabulary import check_stores
from llmtune.data.tokenize.chat_template import load_chat_template
from llmtune.data.tokenized_source import ProgressCallback, TokenizeProgress
from llmtune.errors import CheckpointError, ConfigError
from llmtune.export.prerequisites import check_exportable
from llmtune.model.source import resolve_model_folder
from llmtune.model.tokenizer import load_tokenizer
from llmtune.model.untrained_tokens import find_untrained_tokens
from llmtune.plan.batch_schedule import ScheduledBatch
from llmtune.plan.batch_sizes import BatchPlan
from llmtune.plan.plan import Plan
from llmtune.plan.prepared_data import PreparedData
from llmtune.plan.run_record import MemoryFailure, RunRecord
from llmtune.plan.steps import StepsPlan, resolve_steps
from llmtune.run.check_model import check_model, check_quantized
from llmtune.storage import layout
from llmtune.storage.signature import read_signer
from llmtune.track.console import PLAIN_INTERVAL_SECONDS, Console
from llmtune.train.mirror_owner import resolve_run_id, withdraw_left_copies
from llmtune.train.request import RunRequest
from llmtune.train.resume import began_from, resume_point
from llmtune.train.run_folder import RunFolder
from llmtune.units import format_count


@dataclass(frozen=True, slots=True)
class RunTarget:
    """Name and folder of a run."""

    name: str
    folder: Path


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """The inputs of every attempt of a command, checked and prepared once."""

    config: Config
    """With the planned ``train.global_batch_size``."""
    overrides: list[str]
    """As they were typed."""
    target: RunTarget
    folder: RunFolder
    run_id: str
    """What the run's place at ``checkpoint.mirror`` is marked with."""
    model_folder: Path
    data: PreparedData
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
        """The same inputs, which resume the run's own newest checkpoint."""
        return replace(self, config=replace(self.config, resume_from_checkpoint="auto"))


def prepare_run(
    composed: Composed, plan: Plan, target: RunTarget, folder: RunFolder, console: Console
) -> RunInputs:
    """Check the command, and prepare model files and data; nothing of it depends on the attempt.

    Args:
        plan: Of the first attempt. Those of others have the same batch and attention.

    Raises:
        LlmtuneError: Of every kind but export, before any rank has begun.
    """
    # The folder and the checkpoint first: they are refused before anything that takes long.
    # Rank 0 reads the signing key again when it has built the model.
    read_signer(composed.config.checkpoint.sign)
    step_rows = plan.batch.global_batch_size
    config = replace(
        composed.config, train=replace(composed.config.train, global_batch_size=step_rows)
    )
    changed = folder.find_changes(config)
    if changed:
        console.say(f"changed since the last start: {', '.join(changed)}")
    resume_from = resume_point(folder, config, target.name, console.say)
    run_id = resolve_run_id(folder, config, target.name, resume_from, console.say)

    # The model, and whether its export will be possible.
    cache = cache_dir(config)
    model_folder = resolve_model_folder(config.model, cache, console.say)
    check_quantized(config, plan.placement.zero_stage, model_folder)
    check_model(config, plan.attn_implementation, model_folder, cache, console.say)
    check_exportable(config.export, model_folder)

    # The rows, and the steps that they make.
    tokenizer = load_tokenizer(
        model_folder, config.model, load_chat_template(config.data.chat_template)
    )
    data = prepare_data(config.data, tokenizer, config.seed, cache, watch_tokenizing(console))
    _check_data(config, data, tokenizer, model_folder, console)
    steps = _resolve_steps(config, data, plan.batch)
    longer = folder.find_extension(steps, data.fingerprint)
    if longer:
        console.say(longer)
    return RunInputs(
        config=config,
        overrides=composed.overrides,
        target=target,
        folder=folder,
        run_id=run_id,
        model_folder=model_folder,
        data=data,
        steps=steps,
        resume_from=resume_from,
    )


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
    if folder.finished_step is not None and folder.finished_step >= steps.total_steps:
        return None
    step = _resolve_resume_step(resume_from, steps.total_steps, data.fingerprint)
    record = RunRecord.of_plan(
        plan,
        steps=steps,
        data=data,
        model_folder=inputs.model_folder,
        run_name=inputs.target.name,
        run_id=inputs.run_id,
        began_from=began_from(folder, config),
        history=history,
    )
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
        run_folder=folder.path,
        run_name=inputs.target.name,
        model_folder=inputs.model_folder,
        resume_from=resume_from,
        run_id=inputs.run_id,
    )


def _resolve_steps(config: Config, data: PreparedData, batch: BatchPlan) -> StepsPlan:
    """Resolve the number of steps; a batch that grows with tokens needs the rows for it."""
    rows = None if config.data.streaming else data.train.rows
    count_steps = None
    scheduled = ScheduledBatch.from_config(config.train, batch)
    if rows is not None and scheduled.schedule.counts_tokens:
        count_steps = step_counter(open_rows(data, "train"), scheduled, config.seed)
    return resolve_steps(config.train, config.schedule, rows, batch.global_batch_size, count_steps)


def watch_tokenizing(console: Console) -> ProgressCallback:
    """Make a callback that shows a progress line while sources are tokenized."""
    shown = 0.0

    def watch(progress: TokenizeProgress) -> None:
        nonlocal shown
        now = time.monotonic()
        if (
            now - shown < (0.2 if console.is_terminal else PLAIN_INTERVAL_SECONDS)
            or progress.seconds < 1
        ):
            return
        shown = now
        share = "" if progress.share is None else f"{_bar(progress.share)} {progress.share:4.0%}  "
        console.progress(
            f"tokenizing {progress.source}  {share}{format_count(progress.rows)} rows  "
            f"{format_count(int(progress.tokens / progress.seconds))} tokens/s"
        )

    return watch


def _bar(share: float, width: int = 20) -> str:
    done = round(share * width)
    return "#" * done + "." * (width - done)


def _check_data(
    config: Config, data: PreparedData, tokenizer: Any, model_folder: Path, console: Console
) -> None:
    """Check that the prepared rows can be trained on.

    Raises:
        ConfigError: The rows have labels, and no classifier can be trained yet.
        DataError: Rows of the stream's beginning cannot be trained on, or hold tokens that the
            model does not know.
    """
    if data.classes:
        raise ConfigError(
            f"data.train={config.data.train} is classification data"
            f" ({', '.join(map(str, data.classes[:4]))} ...): it can be checked with llmtune data,"
            " but a classifier cannot be trained yet"
        )
    unknown = set(data.unknown_fields)
    if config.data.streaming:
        from llmtune.data.load.streaming import RowStream

        unknown |= RowStream(
            config.data, tokenizer, config.seed, model_folder=model_folder
        ).find_unknown_fields()
    if unknown:
        console.say(f"fields of the rows that are not read: {describe_unknown_fields(unknown)}")
    check_stores((*data.train_stores, *data.eval_stores), model_folder, tokenizer)
    untrained = find_untrained_tokens(model_folder, data.special_tokens)
    if untrained:
        tokens = ", ".join(map(str, tokenizer.convert_ids_to_tokens(untrained)))
        console.say(
            f"warning: the rows hold {tokens}, whose embeddings {config.model.name_or_path} never"
            " trained; take the model's instruct version, or a data.chat_template with tokens that"
            " it knows"
        )


def cache_dir(config: Config) -> Path:
    """Open the folder of converted models and tokenized data.

    Raises:
        MissingPrerequisiteError: It is another user's, or cannot be made.
    """
    return open_cache(config.paths)


def lock_file(folder: RunFolder) -> Path:
    """The lock of a run folder."""
    return folder.path / layout.LOCK


def _data_name(config: Config) -> str:
    """The name of the first file, without its ending."""
    path = parse_sources(config.data.train, "data.train", config.data.format)[0].path
    return Path(path.split("*")[0].rstrip("/")).name.split(".")[0] or "data"


def _resolve_resume_step(checkpoint: Path | None, total_steps: int, data_fingerprint: str) -> int:
    """Check that a checkpoint can be resumed; its step, or -1 for a new run."""
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

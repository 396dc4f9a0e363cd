"""From the command line to a run request: what the supervisor does before it starts ranks, and rank
0 under a launcher.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmtune.checkpoint.trainer_state import read_trainer_state
from llmtune.config.cache_folder import open_cache
from llmtune.config.compose import Composed
from llmtune.config.groups.data import name_data
from llmtune.config.schema import Config
from llmtune.data.prepare import PROBLEMS, PreparedData, prepare_data
from llmtune.data.read.sources import parse_sources
from llmtune.data.rows.fields import describe_unknown_fields
from llmtune.data.store.vocabulary import check_stores
from llmtune.data.tokenize.chat_template import load_chat_template
from llmtune.data.tokenized_source import ProgressCallback, TokenizeProgress
from llmtune.errors import CheckpointError, ConfigError
from llmtune.export.preflight import check_exportable
from llmtune.model.source import resolve_model_folder
from llmtune.model.tokenizer import load_tokenizer
from llmtune.model.untrained_tokens import find_untrained_tokens
from llmtune.plan.plan import Plan
from llmtune.plan.steps import resolve_steps
from llmtune.run.adapter import describe_adapter
from llmtune.run.check_model import check_model
from llmtune.storage import layout
from llmtune.storage.signature import read_signer
from llmtune.track.console import PLAIN_INTERVAL_SECONDS, Console
from llmtune.train.mirror_owner import resolve_run_id, withdraw_left_copies
from llmtune.train.request import RunRequest
from llmtune.train.resume import began_from, resume_point
from llmtune.train.run_folder import RunFolder
from llmtune.tuner.tuner import TUNERS
from llmtune.units import format_bytes, format_count


@dataclass(frozen=True, slots=True)
class RunTarget:
    """Name and folder of a run."""

    name: str
    folder: Path


def resolve_target(composed: Composed) -> RunTarget:
    """The run's name and folder: the user's, or the names of model, tuner and data, and of ZeRO
    where it was chosen.
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


def resolve_request(
    composed: Composed,
    plan: Plan,
    target: RunTarget,
    folder: RunFolder,
    console: Console,
    notes: dict[str, Any] | None = None,
) -> RunRequest | None:
    """Check, prepare model files and data, and write the run folder's description; None when the
    run is finished.

    Args:
        notes: More for ``plan.json``.

    Raises:
        LlmtuneError: Of every kind but export, before any rank has begun.
    """
    # Rank 0 reads it again when it has built the model.
    read_signer(composed.config.checkpoint.sign)
    step_rows = plan.batch.global_batch_size
    config = replace(
        composed.config, train=replace(composed.config.train, global_batch_size=step_rows)
    )
    changed = folder.check_owner(config)
    if changed:
        console.say(f"changed since the last start: {', '.join(changed)}")
    resume_from = resume_point(folder, config, target.name, console.say)
    run_id = resolve_run_id(folder, config, target.name, resume_from, console.say)
    cache = cache_dir(config)
    model_folder = resolve_model_folder(config.model, cache, console.say)
    stage = plan.placement.zero_stage
    check_model(config, plan.attn_implementation, stage, model_folder, cache, console.say)
    check_exportable(config.export, model_folder)
    tokenizer = load_tokenizer(
        model_folder, config.model, load_chat_template(config.data.chat_template)
    )
    data = prepare_data(config.data, tokenizer, config.seed, cache, watch_tokenizing(console))
    _check_data(config, data, tokenizer, model_folder, console)
    epoch_rows = None if config.data.streaming else data.train.rows
    steps = resolve_steps(config.train, config.schedule, epoch_rows, step_rows)
    longer = folder.check_length(steps, data.fingerprint)
    if longer:
        console.say(longer)
    if folder.finished_step is not None and folder.finished_step >= steps.total_steps:
        return None
    request = RunRequest(
        config=config,
        plan=plan,
        steps=steps,
        data=data,
        run_folder=target.folder,
        run_name=target.name,
        model_folder=model_folder,
        resume_from=resume_from,
        run_id=run_id,
    )
    step = _check_resume(resume_from, steps.total_steps, data.fingerprint)
    about: dict[str, Any] = {
        "steps": asdict(steps),
        "data": asdict(data),
        "model_folder": str(model_folder),
    }
    about |= {
        "run_name": target.name,
        "run_id": run_id,
        "began_from": began_from(folder, config),
        **(notes or {}),
    }
    if resume_from is not None:
        first_left = folder.first_left(step, resume_from)
        withdraw_left_copies(config, target.name, run_id, first_left, console.say)
    for note in folder.begin(
        config, composed.overrides, {**plan.to_dict(), **about}, step, resume_from
    ):
        console.say(note)
    if data.left_out:
        shutil.copyfile(Path(data.folder) / PROBLEMS, target.folder / layout.BAD_ROWS)
        console.say(
            f"{data.left_out} rows cannot be used and are left out:"
            f" {target.folder / layout.BAD_ROWS}"
        )
    return request


def watch_tokenizing(console: Console) -> ProgressCallback:
    """A progress line while sources are tokenized."""
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
    """What stands between prepared rows and training them.

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

        unknown |= RowStream(config.data, tokenizer, config.seed, model_folder=model_folder).check()
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


def describe(request: RunRequest) -> dict[str, str]:
    """The derived numbers and where they came from, for the page before step 1."""
    config, plan, data, steps = request.config, request.plan, request.data, request.steps
    shape = plan.shape
    tuner = TUNERS.find(config.tuner.kind).describe(config.tuner)
    rows = {
        "model": f"{config.model.name_or_path} from {request.model_folder}",
        "parameters": (
            f"{format_count(shape.parameters)}, of which {tuner} trains "
            f"{format_count(shape.trainable_parameters)}"
        ),
        "data": describe_data(config, data),
        "hardware": plan.hardware.describe(),
        "batch": plan.batch.describe(),
        "steps": f"{steps.total_steps}, {steps.warmup_steps} of them warm-up ({steps.origin})",
        "learning rate": f"{plan.learning_rate:g}, {config.schedule.lr_scheduler_type}",
        "precision": f"{config.precision.value}; fp32 master weights and moments",
        "placement": plan.placement.describe(),
        "memory": describe_memory(plan),
        "derived": "; ".join(plan.notes),
        "run folder": str(request.run_folder),
    }
    if config.tuner.adapter_path is not None:
        rows["adapter"] = describe_adapter(config.tuner)
    if request.resume_from:
        rows["resuming"] = str(request.resume_from)
    return rows


def describe_data(config: Config, data: PreparedData) -> str:
    """Rows, tokens, what was left out, and what is held out."""
    train, held_out = data.train, data.eval
    if config.data.streaming:
        text = f"streamed from {name_data(config.data.train)}"
    else:
        rows = f"{name_data(config.data.train)}: {train.rows} rows"
        if train.packing_efficiency is not None:
            rows += f" of {train.documents} packed (filled to {train.packing_efficiency:.1%})"
        text = (
            f"{rows}, {format_count(train.tokens)} tokens, {format_count(train.trained_tokens)}"
            " trained"
        )
    counts = {
        "dropped as over-long": train.dropped,
        "truncated": train.truncated,
        "skipped": train.skipped,
    }
    counts["left out because a held-out row is the same"] = train.twins
    text += "".join(f", {count} {what}" for what, count in counts.items() if count)
    if held_out is None:
        return f"{text}; held out: none"
    origin = f" of {name_data(config.data.eval)}" if config.data.eval is not None else ""
    return f"{text}; held out: {held_out.rows} rows{origin}" + (
        f", {held_out.dropped} dropped" if held_out.dropped else ""
    )


def describe_memory(plan: Plan) -> str:
    """What a rank is planned to need at its peak."""
    memory = plan.memory
    if plan.hardware.accelerator == "cpu":
        text = f"about {format_bytes(memory.device.total + memory.host.total)} a rank at its peak"
    else:
        host = format_bytes(memory.host.total)
        text = (
            f"about {format_bytes(memory.device.total)} a GPU at its peak, {host} of host memory a"
            " rank"
        )
    if memory.nvme:
        text += (
            f", {format_bytes(memory.nvme)} on NVMe, {format_bytes(memory.nvme_written_per_step)}"
            " written a step"
        )
    return text


def cache_dir(config: Config) -> Path:
    """Folder of converted models and tokenized data.

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


def _check_resume(checkpoint: Path | None, total_steps: int, data_fingerprint: str) -> int:
    """Step of a checkpoint of the same rows; -1 for a new run, none of whose old lines count."""
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

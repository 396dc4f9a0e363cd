"""From the command line to a run request: what the supervisor does before it starts ranks, and rank 0 under a launcher."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtune.checkpoint import names
from llmtune.checkpoint.save import read_trainer_state
from llmtune.config.compose import Composed
from llmtune.config.schema import Config
from llmtune.data.prepare import prepare_data
from llmtune.data.render import check_chat_template, load_chat_template
from llmtune.errors import CheckpointError
from llmtune.model.files import resolve_model_folder
from llmtune.model.tokenizer import load_tokenizer
from llmtune.plan.resolve import Plan, resolve_steps
from llmtune.plan.units import format_bytes, format_count
from llmtune.train.request import RunRequest
from llmtune.train.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class RunTarget:
    """Name and folder of a run."""

    name: str
    folder: Path


def resolve_target(composed: Composed) -> RunTarget:
    """The run's name and folder: the user's, or the names of model, tuner and data, and of ZeRO where it was chosen."""
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
    say: Callable[[str], None],
    notes: dict[str, Any] | None = None,
) -> RunRequest | None:
    """Check, prepare model files and data, and write the run folder's description; None when the run is finished.

    Args:
        notes: More for ``plan.json``.

    Raises:
        LlmtuneError: Of every kind but export, before any rank has begun.
    """
    config = composed.config
    folder.check_owner(config)
    resume_from = folder.resume_point(config)
    cache = cache_dir(config)
    model_folder = resolve_model_folder(config.model, cache, say)
    tokenizer = load_tokenizer(model_folder, config.model, load_chat_template(config.data.chat_template))
    check_chat_template(tokenizer, config.model.name_or_path)
    data = prepare_data(config.data, tokenizer, config.seed, cache)
    steps = resolve_steps(config.train, config.schedule, data.train.rows)
    longer = folder.check_length(steps, data.fingerprint)
    if longer:
        say(longer)
    if folder.finished_step is not None and folder.finished_step >= steps.total_steps:
        return None
    request = RunRequest(config, plan, steps, data, target.folder, target.name, model_folder, resume_from)
    step = _check_resume(resume_from, steps.total_steps, data.fingerprint)
    extra = {"steps": asdict(steps), "data": asdict(data), "model_folder": str(model_folder), "run_name": target.name}
    extra |= notes or {}
    for note in folder.begin(config, composed.overrides, plan, extra, step):
        say(note)
    return request


def describe(request: RunRequest) -> dict[str, str]:
    """The derived numbers and where they came from, for the page before step 1."""
    config, plan, data, steps = request.config, request.plan, request.data, request.steps
    shape = plan.shape
    train = data.train
    left_out = f", {train.dropped} dropped as over-long" if train.dropped else ""
    left_out += f", {train.truncated} truncated" if train.truncated else ""
    held_out = "none"
    if data.eval:
        held_out = f"{data.eval.rows} rows" + (f", {data.eval.dropped} dropped" if data.eval.dropped else "")
    tuner = config.tuner.kind.value + (f" r={config.tuner.lora_r}" if config.tuner.kind.value == "lora" else "")
    rows = {
        "model": f"{config.model.name_or_path} from {request.model_folder}",
        "parameters": f"{format_count(shape.parameters)}, of which {tuner} trains "
        f"{format_count(shape.trainable_parameters)}",
        "data": f"{train.rows} rows, {format_count(train.tokens)} tokens, {format_count(train.trained_tokens)} "
        f"trained{left_out}; held out: {held_out}",
        "hardware": plan.hardware.describe(),
        "batch": plan.batch.describe(),
        "steps": f"{steps.total_steps}, {steps.warmup_steps} of them warm-up ({steps.origin})",
        "learning rate": f"{plan.learning_rate:g}, {config.schedule.lr_scheduler_type.value}",
        "precision": f"{config.precision.value}; fp32 master weights and moments",
        "placement": plan.placement.describe(),
        "memory": describe_memory(plan),
        "derived": "; ".join(plan.notes),
        "run folder": str(request.run_folder),
    }
    if request.resume_from:
        rows["resuming"] = str(request.resume_from)
    return rows


def describe_memory(plan: Plan) -> str:
    """What a rank is planned to need at its peak."""
    memory = plan.memory
    if plan.hardware.accelerator == "cpu":
        text = f"about {format_bytes(memory.device.total + memory.host.total)} a rank at its peak"
    else:
        host = format_bytes(memory.host.total)
        text = f"about {format_bytes(memory.device.total)} a GPU at its peak, {host} of host memory a rank"
    if memory.nvme:
        text += f", {format_bytes(memory.nvme)} on NVMe, {format_bytes(memory.nvme_written_per_step)} written a step"
    return text


def cache_dir(config: Config) -> Path:
    """Folder of converted models and tokenised data."""
    return Path(config.paths.cache_dir).expanduser()


def lock_file(folder: RunFolder) -> Path:
    """The lock of a run folder."""
    return folder.path / names.LOCK


def _data_name(config: Config) -> str:
    """The name of the first file, without its ending."""
    train = config.data.train
    return Path(str(train[0] if isinstance(train, list) else train)).name.split(".")[0]


def _check_resume(checkpoint: Path | None, total_steps: int, data_fingerprint: str) -> int:
    """Step of a checkpoint of the same rows; -1 for a new run, none of whose old lines count."""
    if checkpoint is None:
        return -1
    state = read_trainer_state(checkpoint)
    if state.data_fingerprint != data_fingerprint:
        raise CheckpointError(
            f"{checkpoint} was trained on other rows than data.train gives now; take its data, or start anew"
        )
    if state.step > total_steps:
        raise CheckpointError(f"{checkpoint} is at step {state.step}, beyond the {total_steps} steps of this run")
    return state.step

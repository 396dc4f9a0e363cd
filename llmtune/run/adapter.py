"""Check ``tuner.adapter_path``, the adapter that training begins from, before any rank starts."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.checkpoint.find import find_checkpoints
from llmtune.config.composed import Composed
from llmtune.config.groups.tuner import TunerConfig
from llmtune.config.schema import Config
from llmtune.config.stored import load_config
from llmtune.errors import CheckpointError
from llmtune.storage import layout
from llmtune.tuner.stored_adapter import (
    PREFIX,
    StoredAdapter,
    adopt_settings,
    find_misfits,
    read_stored_adapter,
    to_file_name,
)

if TYPE_CHECKING:
    from llmtune.plan.memory.shapes import ModelShape


def adopt_adapter(composed: Composed, run: Path | None = None) -> Composed:
    """Take ranks, scales and modules from the adapter of ``tuner.adapter_path`` into the config.

    Args:
        run: The run's folder. A run that has begun resumes its own checkpoints, even if the adapter
            is gone.

    Raises:
        CheckpointError: There is no adapter, or of a kind that is not trained here.
        ConfigError: The user set what contradicts it.
    """
    tuner = composed.config.tuner
    if tuner.adapter_path is None:
        return composed
    folder = _folder(tuner)
    begun = (
        _stored_tuner(run, tuner)
        if run is not None and not (folder / layout.ADAPTER_CONFIG).is_file()
        else None
    )
    if begun is None:
        try:
            begun = adopt_settings(tuner, read_stored_adapter(folder), _asked(composed))
        except CheckpointError as error:
            raise CheckpointError(f"tuner.adapter_path: {error}") from error
    return replace(composed, config=replace(composed.config, tuner=begun))


def check_adapter(config: Config, shape: ModelShape, run: Path) -> None:
    """Check that the adapter's tensors fit the layers that will be adapted, and are finite.

    Args:
        shape: Of the model with the adapter's settings.
        run: The run's folder; where it has checkpoints, those are loaded instead.

    Raises:
        CheckpointError: The adapter is another model's, or damaged.
    """
    if config.tuner.adapter_path is None or find_checkpoints(run):
        return
    from llmtune.storage.tensors.tensor_checks import find_bad_tensors

    stored = read_stored_adapter(_folder(config.tuner))
    problems = find_misfits(stored, _built(shape), config.model.name_or_path)
    problems = problems or find_bad_tensors(stored.folder / layout.ADAPTER_WEIGHTS)
    if problems:
        raise CheckpointError(
            f"tuner.adapter_path={config.tuner.adapter_path} is no adapter of"
            f" {config.model.name_or_path}{_base(stored)}: {'; '.join(problems[:4])}"
        )


def describe_adapter(tuner: TunerConfig) -> str:
    """Describe the adapter on the page before step 1."""
    scale = " / sqrt(r)" if tuner.use_rslora else " / r"
    text = f"begins from {tuner.adapter_path}: r {tuner.lora_r}, scale {tuner.lora_alpha:g}{scale}"
    patterns = {"rank": tuner.rank_pattern, "alpha": tuner.alpha_pattern}
    for name, pattern in patterns.items():
        if pattern:
            text += (
                f", another {name} for"
                f" {', '.join(f'{key} ({value})' for key, value in list(pattern.items())[:4])}"
            )
            text += " ..." if len(pattern) > 4 else ""
    return text


def _folder(tuner: TunerConfig) -> Path:
    return Path(str(tuner.adapter_path)).expanduser()


def _asked(composed: Composed) -> set[str]:
    """Return keys of ``tuner`` that the command line set, or that an experiment changed."""
    tuner, defaults = composed.config.tuner, TunerConfig()
    return {
        item.name
        for item in fields(TunerConfig)
        if composed.explicit(f"tuner.{item.name}")
        or getattr(tuner, item.name) != getattr(defaults, item.name)
    }


def _stored_tuner(run: Path, tuner: TunerConfig) -> TunerConfig | None:
    """Return the tuner that the run began with, if it has checkpoints of the same adapter."""
    file = run / layout.CONFIG
    if not file.is_file() or not find_checkpoints(run):
        return None
    stored = load_config(file).tuner
    return stored if stored.adapter_path == tuner.adapter_path else None


def _built(shape: ModelShape) -> dict[str, int]:
    """Return the elements of each trained tensor, by its name in an adapter file."""
    adapted = {tensor.name.partition(".lora_")[0] for tensor in shape.tensors if tensor.adapter}
    built = {}
    for tensor in shape.tensors:
        if not tensor.trained:
            continue
        owner, _, own = tensor.name.rpartition(".")
        # peft's layer stands around the model's.
        name = f"{owner}.base_layer.{own}" if owner in adapted else tensor.name
        built[f"{PREFIX}{to_file_name(name)}"] = tensor.numel
    return built


def _base(stored: StoredAdapter) -> str:
    base = stored.settings.get("base_model_name_or_path")
    return f" (it names {base} as its base)" if base else ""

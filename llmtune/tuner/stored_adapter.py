"""Read an adapter folder to train further, and check that llmtune can train it.

Only the small files and headers are read, and torch is not needed, so that the supervisor can do it
before any rank starts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtune.config.groups.tuner import TunerConfig
from llmtune.errors import CheckpointError, ConfigError
from llmtune.security.trust import read_foreign
from llmtune.storage.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llmtune.storage.plain_json import parse_json
from llmtune.storage.tensors.safetensors_header import read_header
from llmtune.tuner.lora_settings import match_pattern
from llmtune.tuner.pattern_limits import pattern_problem

#: peft's name for the only adapter, which its files leave out.
ADAPTER_NAME = "default"

_OLD_WEIGHTS_FILE = "adapter_model.bin"

#: peft's prefix of the names of the model's own modules.
PREFIX = "base_model.model."
#: Ends of the names of a pair of matrices.
MATRICES = (".lora_A.weight", ".lora_B.weight")

#: peft's defaults for settings that an older version's file lacks (``peft.LoraConfig``).
PEFT_DEFAULTS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "init_lora_weights": True,
    "modules_to_save": None,
}

#: Settings that do not matter here: they say how an adapter was trained or initialized, or follow
#: from its tensors' names.
_IGNORED = {
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "peft_version",
    "peft_type",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "fan_in_fan_out",
    "ensure_weight_tying",
    "ephemeral_gpu_offload",
    "runtime_config",
    "megatron_core",
    "qalora_group_size",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
    "velora_config",
    "prune_temporary_fields",
    "init_lora_weights",
}

#: Initializations that also change the base; the adapter is then relative to a base that nobody
#: stored.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

#: Key of ``tuner`` -> peft's setting in an adapter folder.
_KEYS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "use_dora": "use_dora",
    "bias": "bias",
    "modules_to_save": "modules_to_save",
}
_MERGE = (
    "merge it with `export base= adapter= output_dir=` and train on the merged model"
    " (model.name_or_path=)"
)


def to_file_name(parameter_name: str) -> str:
    """Return a parameter's name in adapter files."""
    name = parameter_name.replace(f".{ADAPTER_NAME}.", ".").removesuffix(f".{ADAPTER_NAME}")
    # peft writes DoRA's lengths without the name of their parameter.
    return name.removesuffix(".weight") if ".lora_magnitude_vector." in name else name


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """An adapter folder."""

    folder: Path
    settings: dict[str, Any]
    """``adapter_config.json``, with peft's defaults for what is absent."""
    shapes: dict[str, tuple[int, ...]]
    """Tensor -> shape, from the header of the file."""

    @property
    def modules(self) -> list[str]:
        """List the modules of the base that have a pair of matrices, in the order of the file."""
        modules: dict[str, None] = {}
        for name in self.shapes:
            if name.endswith(MATRICES[0]):
                modules[name.removeprefix(PREFIX).removesuffix(MATRICES[0])] = None
        return list(modules)


def read_stored_adapter(folder: Path) -> StoredAdapter:
    """Read an adapter folder's settings and the header of its weights.

    Raises:
        CheckpointError: There is no adapter, or its files cannot be read.
    """
    settings = with_peft_defaults(read_adapter_config(folder))
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        advice = ""
        if (folder / _OLD_WEIGHTS_FILE).is_file():
            advice = f"; convert {_OLD_WEIGHTS_FILE} with peft's save_pretrained"
        raise CheckpointError(f"{folder}: no {ADAPTER_WEIGHTS} in it{advice}")
    try:
        shapes = {name: entry.shape for name, entry in read_header(file).items()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as an adapter ({error})") from error
    return StoredAdapter(folder, settings, shapes)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read the settings of an adapter folder, as its file has them.

    Raises:
        CheckpointError: There is no adapter; or its settings would make peft import a module, or
            match patterns that take years.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise CheckpointError(f"{folder}: no adapter here (it has no {ADAPTER_CONFIG})")
    try:
        values = parse_json(read_foreign(file, CheckpointError))
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}); fetch or copy it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is damaged (it holds no settings); fetch or copy it again")
    if values.get("megatron_config") and (named := values.get("megatron_core")):
        raise CheckpointError(
            f"{file}: megatron_config has peft import {named}, which only a training with Megatron"
            " needs"
        )
    for key, pattern in _patterns(values):
        if problem := pattern_problem(pattern):
            raise CheckpointError(
                f"{file}: {key} has the pattern {pattern[:80]!r}, which is not matched: {problem};"
                " write the modules' names out"
            )
    return values


def _patterns(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the settings that peft uses as regular expressions."""
    for key in ("rank_pattern", "alpha_pattern"):
        yield from ((key, str(pattern)) for pattern in settings.get(key) or {})
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = settings.get(key)
        if isinstance(value, str):
            yield key, value
        elif key == "layers_pattern" and isinstance(value, list):
            yield from ((key, str(pattern)) for pattern in value)


def with_peft_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Complete settings of any version of peft with its defaults for absent and null ones."""
    stated = {
        key: value
        for key, value in settings.items()
        if value is not None or key not in PEFT_DEFAULTS
    }
    return {**PEFT_DEFAULTS, **stated}


def adopt_settings(tuner: TunerConfig, stored: StoredAdapter, asked: set[str]) -> TunerConfig:
    """Return the tuner's config with the ranks, scales and modules of an adapter.

    Args:
        asked: Keys of ``tuner`` that the user set; they must be the adapter's.

    Raises:
        CheckpointError: llmtune cannot train this kind of adapter, with the reason.
        ConfigError: A key that the user set contradicts it.
    """
    _check_kind(stored)
    adopted = {key: stored.settings[name] for key, name in _KEYS.items()}
    adopted["modules_to_save"] = list(adopted["modules_to_save"] or ())
    # Another program may have written the alpha 32 as 32.0.
    adopted["lora_alpha"] = _as_integer(adopted["lora_alpha"])
    adopted["alpha_pattern"] = {
        name: _as_integer(alpha) for name, alpha in adopted["alpha_pattern"].items()
    }
    contradictions = [
        f"tuner.{key}={getattr(tuner, key)}: {stored.folder} has {adopted[key]}; leave it out,"
        " and it is taken from there"
        for key in sorted(asked & adopted.keys())
        if getattr(tuner, key) != adopted[key]
    ]
    if contradictions:
        raise ConfigError.from_problems(contradictions)
    if "target_modules" not in asked:
        adopted["target_modules"] = _targets(stored)
    return replace(tuner, **adopted)


def find_misfits(stored: StoredAdapter, built: dict[str, int], model: str) -> list[str]:
    """Say how an adapter's tensors differ from those that would be built.

    Args:
        built: Elements of each adapter tensor of the model, named as in an adapter file.
        model: The base's name in messages.
    """
    problems = []
    surplus = [name for name in stored.shapes if name not in built]
    lacking = [name for name in built if name not in stored.shapes]
    if surplus:
        problems.append(
            f"{len(surplus)} of its tensors belong to no adapted layer of {model}, such as"
            f" {surplus[0]}"
        )
    if lacking:
        problems.append(f"{len(lacking)} that {model} needs are not in it, such as {lacking[0]}")
    for name, shape in stored.shapes.items():
        if name not in built:
            continue
        if not name.endswith(MATRICES):
            if math.prod(shape) != built[name]:
                problems.append(
                    f"{name} has {math.prod(shape)} elements there and {built[name]} in {model}"
                )
                break
            continue
        rank = _rank(stored, name)
        other = built[name] // rank
        built_shape = (rank, other) if name.endswith(MATRICES[0]) else (other, rank)
        if shape != built_shape:
            stored_sides, built_sides = (
                " x ".join(map(str, sides)) for sides in (shape, built_shape)
            )
            problems.append(f"{name} is {stored_sides} there and {built_sides} in {model}")
            break
    return problems


def _rank(stored: StoredAdapter, tensor: str) -> int:
    module = tensor.removeprefix(PREFIX).rpartition(".lora_")[0]
    return int(match_pattern(stored.settings["rank_pattern"], module, stored.settings["r"]))


def _targets(stored: StoredAdapter) -> str | list[str]:
    """Return the adapter's own list if nothing else chooses modules; else full names."""
    settings = stored.settings
    targets = settings.get("target_modules")
    narrowed = any(
        settings.get(key) not in (None, [], "")
        for key in ("exclude_modules", "layers_to_transform")
    )
    if isinstance(targets, list) and targets and not narrowed:
        return sorted(map(str, targets))
    return stored.modules


def _check_kind(stored: StoredAdapter) -> None:
    settings = stored.settings
    file = stored.folder / ADAPTER_CONFIG
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{file}: peft_type is {settings.get('peft_type')}; only LORA adapters can be"
            " trained on"
        )
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        raise CheckpointError(
            f"{file}: task_type is {settings['task_type']}; only adapters of causal language"
            " models can be trained on"
        )
    start = str(settings["init_lora_weights"]).lower()
    if start.startswith(CHANGES_BASE):
        raise CheckpointError(
            f"{file}: init_lora_weights={start} changed the base before training, and the changed"
            " base is not here. Load it with peft and store it with save_pretrained(...,"
            " path_initial_model_for_weight_conversion=...), which makes a plain adapter of it"
        )

    # Ranks and scales, also those of single modules.
    ranks = {"r": settings["r"], **settings["rank_pattern"]}
    if invalid := [
        f"{key}={rank}" for key, rank in ranks.items() if type(rank) is not int or rank < 1
    ]:
        raise CheckpointError(f"{file}: {invalid[0]} is not a rank: a whole number above 0 is")
    scales = {"lora_alpha": settings["lora_alpha"], **settings["alpha_pattern"]}
    if invalid := [
        f"{key}={json.dumps(scale)}" for key, scale in scales.items() if not _is_scale(scale)
    ]:
        raise CheckpointError(f"{file}: {invalid[0]} is not a scale: a number other than 0 is")

    # Settings, and tensors, of anything but plain LoRA.
    known = _IGNORED | set(_KEYS.values())
    unsupported = sorted(
        key
        for key, value in settings.items()
        if key not in known and value and value != PEFT_DEFAULTS.get(key, False)
    )
    if unsupported:
        described = ", ".join(f"{key}={json.dumps(settings[key])}" for key in unsupported)
        raise CheckpointError(
            f"{file}: {described}: llmtune trains LoRA matrices of linear layers only; {_MERGE}"
        )
    others = [
        name
        for name in stored.shapes
        if not (name.startswith(PREFIX) and _is_trained_here(name, settings))
    ]
    if others:
        raise CheckpointError(
            f"{stored.folder / ADAPTER_WEIGHTS}: {len(others)} tensors are not LoRA matrices of"
            f" linear layers, nor named by its settings, such as {others[0]}; {_MERGE}"
        )
    if not stored.shapes:
        raise CheckpointError(f"{stored.folder / ADAPTER_WEIGHTS} holds no tensors")


def _is_trained_here(name: str, settings: dict[str, Any]) -> bool:
    """Tell whether a tensor is one that the settings announce, and that is trained here."""
    if name.endswith(MATRICES):
        return True
    if name.endswith(".lora_magnitude_vector"):
        return bool(settings["use_dora"])
    if settings["bias"] != "none" and name.endswith("bias"):
        return True
    module = name.removeprefix(PREFIX).rpartition(".")[0]
    while module:
        if module.endswith(tuple(settings["modules_to_save"] or ())):
            return True
        module = module.rpartition(".")[0]
    return False


def _is_scale(value: Any) -> bool:
    """Tell whether a value can be a scale: with 0 nothing is learned, and peft divides it."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value != 0
    )


def _as_integer(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value

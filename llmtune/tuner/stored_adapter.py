"""An adapter folder to go on from: what it is, read without its tensors, and what of it llmtune can
train.

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

_OLD_WEIGHTS_FILE = "adapter_model.bin"

#: What peft's files put before the names of the model's own modules.
PREFIX = "base_model.model."
_MATRICES = (".lora_A.weight", ".lora_B.weight")

#: peft's values of what an older version's file does not have (``peft.LoraConfig``).
PEFT_DEFAULTS: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "init_lora_weights": True,
}

#: Settings that say how an adapter was trained, started or found, or that its tensors' names say
#: better.
_SAID_ELSEWHERE = {
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "peft_version",
        "peft_type",
    ),
    *(
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "fan_in_fan_out",
    ),
    *(
        "ensure_weight_tying",
        "ephemeral_gpu_offload",
        "runtime_config",
        "megatron_core",
        "qalora_group_size",
    ),
    *(
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "loftq_config",
        "velora_config",
        "prune_temporary_fields",
        "init_lora_weights",
    ),
}
_CARRIED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}

#: Starts that also change the base; the adapter is then the difference to a base that nobody
#: stored.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

#: Keys of ``tuner`` -> the setting of peft's that an adapter brings.
_KEYS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}
_MERGE = (
    "merge it with `export base= adapter= output_dir=` and train on the merged model"
    " (model.name_or_path=)"
)


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
        """Modules of the base that have a pair of matrices, in the order of the file."""
        names = (name.removeprefix(PREFIX) for name in self.shapes)
        return list(
            dict.fromkeys(
                name.removesuffix(_MATRICES[0]) for name in names if name.endswith(_MATRICES[0])
            )
        )


def read_stored_adapter(folder: Path) -> StoredAdapter:
    """Read settings and header.

    Raises:
        CheckpointError: There is no adapter, or its files cannot be read.
    """
    settings = with_peft_defaults(read_adapter_config(folder))
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        old = (
            f"; convert {_OLD_WEIGHTS_FILE} with peft's save_pretrained"
            if (folder / _OLD_WEIGHTS_FILE).is_file()
            else ""
        )
        raise CheckpointError(f"{folder}: no {ADAPTER_WEIGHTS} in it{old}")
    try:
        shapes = {name: entry.shape for name, entry in read_header(file).items()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as an adapter ({error})") from error
    return StoredAdapter(folder, settings, shapes)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The settings of an adapter folder, as they stand in its file.

    Raises:
        CheckpointError: There is no adapter; or its settings have peft import a module, or match
            patterns that take years.
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
    """Settings that peft takes for regular expressions."""
    for key in ("rank_pattern", "alpha_pattern"):
        yield from ((key, str(pattern)) for pattern in settings.get(key) or {})
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = settings.get(key)
        if isinstance(value, str):
            yield key, value
        elif key == "layers_pattern" and isinstance(value, list):
            yield from ((key, str(pattern)) for pattern in value)


def with_peft_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of any version of peft, with its defaults for what is absent or null."""
    given = {
        key: value
        for key, value in settings.items()
        if value is not None or key not in PEFT_DEFAULTS
    }
    return {**PEFT_DEFAULTS, **given}


def adopt_settings(tuner: TunerConfig, stored: StoredAdapter, asked: set[str]) -> TunerConfig:
    """The tuner with the ranks, scales and modules of an adapter.

    Args:
        asked: Keys of ``tuner`` that the user set; they must be the adapter's.

    Raises:
        CheckpointError: The adapter is of a kind that is not trained here, with the reason.
        ConfigError: A key that was asked for contradicts it.
    """
    _check_kind(stored)
    found = {key: stored.settings[name] for key, name in _KEYS.items()}
    # 32.0 is the alpha 32, as another program may have written it.
    found["lora_alpha"] = _whole(found["lora_alpha"])
    found["alpha_pattern"] = {name: _whole(alpha) for name, alpha in found["alpha_pattern"].items()}
    contradictions = [
        f"tuner.{key}={getattr(tuner, key)}: {stored.folder} has {found[key]}; leave it out, and it"
        " is taken from there"
        for key in sorted(asked & found.keys())
        if getattr(tuner, key) != found[key]
    ]
    if contradictions:
        raise ConfigError.from_problems(contradictions)
    if "target_modules" not in asked:
        found["target_modules"] = _targets(stored)
    return replace(tuner, **found)


def find_misfits(stored: StoredAdapter, built: dict[str, int], model: str) -> list[str]:
    """What differs between an adapter's tensors and those that would be built, in words.

    Args:
        built: Elements of each adapter tensor of the model, named as in an adapter file.
        model: How messages name the base.
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
        rank = _rank(stored, name)
        other = built[name] // rank
        wanted = (rank, other) if name.endswith(_MATRICES[0]) else (other, rank)
        if shape != wanted:
            there, here = (" x ".join(map(str, sides)) for sides in (shape, wanted))
            problems.append(f"{name} is {there} there and {here} in {model}")
            break
    return problems


def _rank(stored: StoredAdapter, tensor: str) -> int:
    module = tensor.removeprefix(PREFIX).rpartition(".lora_")[0]
    return int(match_pattern(stored.settings["rank_pattern"], module, stored.settings["r"]))


def _targets(stored: StoredAdapter) -> str | list[str]:
    """The adapter's own list where that is all that chooses modules; else each module by its whole
    name.
    """
    targets, settings = stored.settings.get("target_modules"), stored.settings
    narrowed = any(
        settings.get(key) not in (None, [], "")
        for key in ("exclude_modules", "layers_to_transform")
    )
    if isinstance(targets, list) and targets and not narrowed:
        return sorted(map(str, targets))
    return stored.modules


def _check_kind(stored: StoredAdapter) -> None:
    settings, place = stored.settings, stored.folder / ADAPTER_CONFIG
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{place}: peft_type is {settings.get('peft_type')}; only LORA adapters can be"
            " trained on"
        )
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        raise CheckpointError(
            f"{place}: task_type is {settings['task_type']}; only adapters of causal language"
            " models can be trained on"
        )
    start = str(settings["init_lora_weights"]).lower()
    if start.startswith(CHANGES_BASE):
        raise CheckpointError(
            f"{place}: init_lora_weights={start} changed the base before training, and the changed"
            " base is not here. Load it with peft and store it with save_pretrained(...,"
            " path_initial_model_for_weight_conversion=...), which makes a plain adapter of it"
        )
    numbers = {"r": settings["r"], **settings["rank_pattern"]}
    if wrong := [
        f"{key}={rank}" for key, rank in numbers.items() if type(rank) is not int or rank < 1
    ]:
        raise CheckpointError(f"{place}: {wrong[0]} is no rank")
    scales = {"lora_alpha": settings["lora_alpha"], **settings["alpha_pattern"]}
    if wrong := [
        f"{key}={json.dumps(scale)}" for key, scale in scales.items() if not _is_scale(scale)
    ]:
        raise CheckpointError(f"{place}: {wrong[0]} is no scale; a number other than 0 is")
    known = _SAID_ELSEWHERE | _CARRIED
    foreign = sorted(
        key
        for key, value in settings.items()
        if key not in known and value and value != PEFT_DEFAULTS.get(key, False)
    )
    if foreign:
        described = ", ".join(f"{key}={json.dumps(settings[key])}" for key in foreign)
        raise CheckpointError(
            f"{place}: {described}: llmtune trains LoRA matrices of linear layers only; {_MERGE}"
        )
    strange = [
        name for name in stored.shapes if not (name.startswith(PREFIX) and name.endswith(_MATRICES))
    ]
    if strange:
        raise CheckpointError(
            f"{stored.folder / ADAPTER_WEIGHTS}: {len(strange)} tensors are no LoRA matrices of"
            f" linear layers, such as {strange[0]}; {_MERGE}"
        )
    if not stored.shapes:
        raise CheckpointError(f"{stored.folder / ADAPTER_WEIGHTS} holds no tensors")


def _is_scale(value: Any) -> bool:
    """Whether something is learned with it: with 0 nothing is, and peft divides a text by the rank
    in vain.
    """
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value != 0
    )


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value

"""An adapter as peft writes it: its settings, its tensors, and what each of them is for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmtune.errors import CheckpointError, ExportError
from llmtune.export.architecture import headed_task
from llmtune.export.sources.base import open_tensors, some
from llmtune.model.adapter.stored_adapter import (
    CHANGES_BASE,
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    read_adapter_config,
    with_peft_defaults,
)
from llmtune.plan.memory.lora import lora_scale, match_pattern
from llmtune.storage.tensor_checks import find_tensor_problems, find_untrained_adapter

# : Ends of peft's names -> the part that a tensor plays in its module. Older versions wrote some
# with ``.weight``.
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "b_bias",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "token_rows",
    "token_adapter.base_layer.weight": "base_weight",
    "base_layer.weight": "base_weight",
    "base_layer.bias": "base_bias",
    "modules_to_save.weight": "weight",
    "modules_to_save.bias": "bias",
    "weight": "weight",
    "bias": "bias",
}
_NAME = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+?)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})"
)

#: Settings that say how an adapter was trained, started or found, and nothing about what it is.
_HARMLESS = {
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "peft_version",
    ),
    *(
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
    ),
    *(
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "modules_to_save",
    ),
    *(
        "use_dora",
        "trainable_token_indices",
        "lora_bias",
        "ensure_weight_tying",
        "ephemeral_gpu_offload",
    ),
    *(
        "runtime_config",
        "megatron_core",
        "qalora_group_size",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    ),
    *("loftq_config", "velora_config", "init_lora_weights", "prune_temporary_fields"),
}


@dataclass(slots=True)
class Parts:
    """The tensors of one module: part -> name in the file."""

    module: str
    keys: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter folder, opened; tensors are mapped and read when they are asked for."""

    folder: Path
    settings: dict[str, Any]
    modules: dict[str, Parts]
    shapes: dict[str, tuple[int, ...]]
    handle: Any

    def read(self, key: str) -> torch.Tensor:
        """One tensor."""
        tensor: torch.Tensor = self.handle.get_tensor(key)
        return tensor

    def scale(self, module: str, rank: int) -> float:
        """What ``B @ A`` is multiplied with: alpha / r, or alpha / sqrt(r) for rsLoRA.

        Raises:
            ExportError: The matrices have another rank than the settings say.
        """
        expected = int(match_pattern(self.settings["rank_pattern"], module, self.settings["r"]))
        if rank != expected:
            raise ExportError(
                f"{self.folder}: {module} has rank {rank}, {CONFIG_FILE} says {expected}"
            )
        alpha = float(
            match_pattern(self.settings["alpha_pattern"], module, self.settings["lora_alpha"])
        )
        return lora_scale(alpha, rank, bool(self.settings["use_rslora"]))

    def token_indices(self, module: str) -> tuple[int, ...]:
        """The rows of an embedding that were trained; a plain list is for the input embedding."""
        given = self.settings.get("trainable_token_indices") or []
        if isinstance(given, dict):
            given = next((rows for name, rows in given.items() if module.endswith(name)), [])
        return tuple(int(row) for row in given)


def read_adapter(folder: Path) -> Adapter:
    """Open an adapter and sort its tensors by module.

    Raises:
        ExportError: It cannot be read or merged, a tensor is none of an adapter, or it was never
            trained.
    """
    try:
        settings = with_peft_defaults(read_adapter_config(folder))
    except CheckpointError as error:
        raise ExportError(f"cannot be read as an adapter: {error}") from error
    _check_settings(folder, settings)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise ExportError(
            f"{folder}: cannot be read as an adapter: no {WEIGHTS_FILE}; convert an"
            " adapter_model.bin with peft"
        )
    handle = open_tensors(file)
    shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    if not shapes:
        raise ExportError(f"{file} holds no tensors; nothing was written")
    modules, strange = _sort(shapes)
    if strange:
        raise ExportError(
            f"{file} holds {len(strange)} tensors that no adapter has: {some(strange)}; nothing was"
            " written"
        )
    adapter = Adapter(
        folder=folder, settings=settings, modules=modules, shapes=shapes, handle=handle
    )
    problems = [*_find_incomplete(adapter), *_find_contradictions(adapter)]
    problems = problems or find_tensor_problems(file)
    if not any(
        part in parts.keys
        for parts in modules.values()
        for part in ("weight", "token_rows", "base_bias", "bias")
    ):
        problems += find_untrained_adapter(file)
    if problems:
        raise ExportError(
            f"{file}: {'; '.join(problems[:4])}{' ...' if len(problems) > 4 else ''}; nothing was"
            " written"
        )
    return adapter


def _sort(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Parts], list[str]]:
    """Modules with their parts, and names that are none."""
    modules: dict[str, Parts] = {}
    strange = []
    for name in sorted(shapes):
        match = _NAME.fullmatch(name)
        if match is None:
            strange.append(name)
            continue
        parts = modules.setdefault(match["module"], Parts(match["module"]))
        parts.keys[_PARTS[match["part"]]] = name
    return modules, strange


def _find_incomplete(adapter: Adapter) -> Iterator[str]:
    """Matrices without a partner, or of another kind than linear and embedding layers have."""
    for module, parts in adapter.modules.items():
        for first, second in (("a", "b"), ("embedding_a", "embedding_b")):
            here = [part for part in (first, second) if part in parts.keys]
            if len(here) == 1:
                yield f"{parts.keys[here[0]]} is no LoRA pair: its partner is missing"
            elif here:
                a, b = (adapter.shapes[parts.keys[part]] for part in here)
                if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
                    yield (
                        f"{module} has matrices of shapes {a} and {b}; only linear and embedding"
                        " layers can be merged"
                    )
        if ("magnitude" in parts.keys) != bool(adapter.settings.get("use_dora")) and {
            "a",
            "embedding_a",
        } & parts.keys.keys():
            yield (
                f"{module}: use_dora={bool(adapter.settings.get('use_dora'))} in {CONFIG_FILE},"
                " which its tensors contradict"
            )
        if {"b_bias", "magnitude"} & parts.keys.keys() and not {
            "a",
            "embedding_a",
        } & parts.keys.keys():
            yield f"{some(sorted(parts.keys.values()))} is no LoRA pair: the matrices are missing"


def _find_contradictions(adapter: Adapter) -> Iterator[str]:
    """What the settings announce and no tensor brings."""
    parts = {part for found in adapter.modules.values() for part in found.keys}
    if adapter.settings.get("trainable_token_indices") and "token_rows" not in parts:
        yield f"{CONFIG_FILE} has trainable_token_indices, and no tensor holds trained rows"
    whole = [
        module
        for module, found in adapter.modules.items()
        if {"weight", "bias"} & found.keys.keys()
    ]
    saved = adapter.settings.get("modules_to_save") or []
    # peft lists every name that a head of the task may have; a model has one of them.
    task = headed_task(adapter.settings.get("task_type"))
    heads = task.heads if task is not None else ()
    found_head = any(module.split(".")[0] in heads for module in whole)
    for name in saved:
        if not any(is_saved(module, name) for module in whole) and not (
            name in heads and found_head
        ):
            yield f"{CONFIG_FILE} has {name} among modules_to_save, and no tensor of it"


def is_saved(module: str, name: str) -> bool:
    """Whether a name in ``modules_to_save`` means this module, or one that it is a part of, by its
    end as peft compares it.
    """
    while module:
        if module.endswith(name):
            return True
        module = module.rpartition(".")[0]
    return False


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse what plain arithmetic on weights would merge wrongly."""
    if settings.get("peft_type") != "LORA":
        raise ExportError(
            f"{folder / CONFIG_FILE}: peft_type {settings.get('peft_type')} is not supported, only"
            " LORA; merge it with peft"
        )
    unknown = sorted(key for key, value in settings.items() if value and key not in _HARMLESS)
    if unknown:
        raise ExportError(
            f"{folder / CONFIG_FILE}: merging with {', '.join(unknown)} is not supported; merge it"
            " with peft"
        )
    start = str(settings.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGES_BASE):
        raise ExportError(
            f"{folder / CONFIG_FILE}: init_lora_weights={start} changed the base before training,"
            " and the changed base is not here. Load it with peft and store it with"
            " save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes a"
            " plain adapter of it"
        )

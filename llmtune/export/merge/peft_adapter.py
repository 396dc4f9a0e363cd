"""Read an adapter that peft wrote: its settings, and its tensors by module and role."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmtune.errors import CheckpointError, ExportError
from llmtune.export.architecture import headed_task
from llmtune.export.merge.adapter import Adapter, ModuleTensors, is_module_to_save
from llmtune.export.sources.tensor_source import open_tensors
from llmtune.storage.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llmtune.storage.tensors.tensor_checks import (
    find_bad_tensors,
    find_untrained_adapter,
)
from llmtune.tuner.stored_adapter import (
    CHANGES_BASE,
    PREFIX,
    read_adapter_config,
    with_peft_defaults,
)
from llmtune.units import some

#: Ends of peft's names -> the role of a tensor in its module. Older versions wrote some with
#: ``.weight``.
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

#: Settings that are merged correctly, or that concern only training and loading.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "peft_version",
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "modules_to_save",
        "use_dora",
        "trainable_token_indices",
        "lora_bias",
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
        "init_lora_weights",
        "prune_temporary_fields",
    }
)


def read_adapter(folder: Path) -> Adapter:
    """Open an adapter and sort its tensors by module.

    Raises:
        ExportError: It cannot be read or merged, a tensor does not belong to an adapter, or it was
            never trained.
    """
    try:
        settings = with_peft_defaults(read_adapter_config(folder))
    except CheckpointError as error:
        raise ExportError(f"cannot be read as an adapter: {error}") from error
    _check_settings(folder, settings)

    # The tensors, by module.
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise ExportError(
            f"{folder}: cannot be read as an adapter: no {ADAPTER_WEIGHTS}; convert an"
            " adapter_model.bin with peft"
        )
    handle = open_tensors(file)
    shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    if not shapes:
        raise ExportError(f"{file} holds no tensors; nothing was written")
    modules, unknown = _sort(shapes)
    if unknown:
        raise ExportError(
            f"{file} holds {len(unknown)} tensors that no adapter has: {some(unknown)}; nothing was"
            " written"
        )

    # Problems of the adapter as a whole: matrices without a partner, NaN, no training.
    adapter = Adapter(
        folder=folder, settings=settings, modules=modules, shapes=shapes, handle=handle
    )
    problems = [*_find_incomplete(adapter), *_find_contradictions(adapter)]
    problems = problems or find_bad_tensors(file)
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


def _sort(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, ModuleTensors], list[str]]:
    """Return the tensors by module, and names that no adapter has."""
    modules: dict[str, ModuleTensors] = {}
    unknown = []
    for name in sorted(shapes):
        match = _NAME.fullmatch(name)
        if match is None:
            unknown.append(name)
            continue
        parts = modules.setdefault(match["module"], ModuleTensors(match["module"]))
        parts.keys[_PARTS[match["part"]]] = name
    return modules, unknown


def _find_incomplete(adapter: Adapter) -> Iterator[str]:
    """Find matrices without a partner, or with shapes of other layers than linear and embedding."""
    for module, parts in adapter.modules.items():
        has_matrices = "a" in parts.keys or "embedding_a" in parts.keys
        for pair in (("a", "b"), ("embedding_a", "embedding_b")):
            stored = [parts.keys[part] for part in pair if part in parts.keys]
            if len(stored) == 1:
                yield f"{stored[0]} is no LoRA pair: its partner is missing"
            elif stored:
                a, b = (adapter.shapes[key] for key in stored)
                if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
                    yield (
                        f"{module} has matrices of shapes {a} and {b}; only linear and embedding"
                        " layers can be merged"
                    )
        use_dora = bool(adapter.settings.get("use_dora"))
        if has_matrices and ("magnitude" in parts.keys) != use_dora:
            yield f"{module}: use_dora={use_dora} in {ADAPTER_CONFIG}, which its tensors contradict"
        if not has_matrices and ("b_bias" in parts.keys or "magnitude" in parts.keys):
            yield f"{some(sorted(parts.keys.values()))} is no LoRA pair: the matrices are missing"


def _find_contradictions(adapter: Adapter) -> Iterator[str]:
    """Find settings that name tensors which are not in the file."""
    parts = {part for module in adapter.modules.values() for part in module.keys}
    if adapter.settings.get("trainable_token_indices") and "token_rows" not in parts:
        yield f"{ADAPTER_CONFIG} has trainable_token_indices, and no tensor holds trained rows"
    saved_modules = [
        name
        for name, module in adapter.modules.items()
        if "weight" in module.keys or "bias" in module.keys
    ]
    names = adapter.settings.get("modules_to_save") or []
    # peft lists every name that a head of the task may have, of which a model has one.
    task = headed_task(adapter.settings.get("task_type"))
    heads = task.heads if task is not None else ()
    has_head = any(module.split(".")[0] in heads for module in saved_modules)
    for name in names:
        is_saved = any(is_module_to_save(module, name) for module in saved_modules)
        if not is_saved and not (name in heads and has_head):
            yield f"{ADAPTER_CONFIG} has {name} among modules_to_save, and no tensor of it"


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse settings that plain arithmetic on weights would merge wrongly."""
    if settings.get("peft_type") != "LORA":
        raise ExportError(
            f"{folder / ADAPTER_CONFIG}: peft_type {settings.get('peft_type')} is not supported,"
            " only LORA; merge it with peft"
        )
    unknown = sorted(key for key, value in settings.items() if value and key not in _HARMLESS)
    if unknown:
        raise ExportError(
            f"{folder / ADAPTER_CONFIG}: merging with {', '.join(unknown)} is not supported; merge"
            " it with peft"
        )
    start = str(settings.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGES_BASE):
        raise ExportError(
            f"{folder / ADAPTER_CONFIG}: init_lora_weights={start} changed the base before"
            " training, and the changed base is not here. Load it with peft and store it with"
            " save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes a"
            " plain adapter of it"
        )

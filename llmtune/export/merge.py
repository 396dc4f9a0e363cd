"""Merge a LoRA adapter into its base, one tensor at a time: ``W + scale * B @ A`` in fp32, rounded once.

Memory is that of the largest tensor, whatever the model's size. An adapter tensor that matches nothing is an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmtune.checkpoint.tensor_file import TensorFile, TensorSpec, plan_shards, write_index
from llmtune.errors import CheckpointError, ExportError
from llmtune.model.adapters import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config
from llmtune.model.partition import Entry, read_entries

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter's matrices by the base tensor that they change."""

    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Base tensor name -> (A of shape (r, in), B of shape (out, r))."""
    scale: float


def read_adapter(folder: Path) -> Adapter:
    """Read and pair up an adapter.

    Raises:
        ExportError: It cannot be read, is of another kind than plain LoRA, or a matrix has no partner.
    """
    try:
        settings = read_adapter_config(folder)
        with safe_open(str(folder / WEIGHTS_FILE), framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - no mapping
    except (CheckpointError, SafetensorError, OSError) as error:
        raise ExportError(f"{folder}: cannot be read as an adapter: {error}") from error
    _check_kind(folder, settings)
    bases = {name.removesuffix(_A).removesuffix(_B) for name in tensors}
    strange = [name for name in tensors if not name.startswith(_PREFIX) or not name.endswith((_A, _B))]
    strange += [base for base in bases if (base + _A in tensors) != (base + _B in tensors)]
    if strange or not tensors:
        what = f"{len(strange)} tensors that are no LoRA pair, such as {strange[0]}" if strange else "no tensors"
        raise ExportError(f"{folder / WEIGHTS_FILE} holds {what}; nothing was written")
    pairs = {base.removeprefix(_PREFIX) + ".weight": (tensors[base + _A], tensors[base + _B]) for base in sorted(bases)}
    rank = int(settings["r"])
    root = math.sqrt(rank) if settings.get("use_rslora") else rank
    return Adapter(pairs, settings["lora_alpha"] / root)


def merge(base: Path, adapter: Adapter, folder: Path, max_shard_bytes: int) -> int:
    """Write the merged safetensors into ``folder``; the number of tensors that changed.

    Raises:
        ExportError: The adapter does not belong to the base.
    """
    entries = read_entries(base)
    _check_match(base, entries, adapter)
    specs = [TensorSpec(name, entry.dtype, entry.shape) for name, entry in entries.items()]
    shards = plan_shards(specs, max_shard_bytes)
    for file_name, shard in shards:
        with TensorFile(folder / file_name, shard) as file:
            for spec in shard:
                with safe_open(str(entries[spec.name].file), framework="pt") as handle:
                    tensor = handle.get_tensor(spec.name)
                if spec.name in adapter.pairs:
                    tensor = _merged(tensor, *adapter.pairs[spec.name], adapter.scale)
                file.write(tensor)
    write_index(folder, shards)
    return len(adapter.pairs)


def _merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    merged: torch.Tensor = weight.float() + (b.float() @ a.float()) * scale
    return merged.to(weight.dtype)


def _check_match(base: Path, entries: dict[str, Entry], adapter: Adapter) -> None:
    wrong = []
    for name, (a, b) in adapter.pairs.items():
        shape = entries[name].shape if name in entries else None
        if shape != (b.shape[0], a.shape[1]):
            found = f"is {shape} in the base" if shape else "is not in the base"
            wrong.append(f"{name} {found}, the adapter is for {(b.shape[0], a.shape[1])}")
    if wrong:
        raise ExportError(
            f"the adapter does not belong to {base}: {len(wrong)} of {len(adapter.pairs)} tensors do not match, such as "
            f"{wrong[0]}; nothing was written"
        )


def _check_kind(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse what plain addition would merge wrongly."""
    strange = [
        key for key in ("use_dora", "fan_in_fan_out", "lora_bias", "trainable_token_indices") if settings.get(key)
    ]
    strange += [key for key in ("rank_pattern", "alpha_pattern", "modules_to_save") if settings.get(key)]
    if settings.get("bias", "none") != "none":
        strange.append("bias")
    if settings.get("peft_type") != "LORA":
        strange.insert(0, f"peft_type {settings.get('peft_type')}")
    if strange:
        raise ExportError(f"{folder / CONFIG_FILE}: merging with {', '.join(strange)} is not supported; use peft")

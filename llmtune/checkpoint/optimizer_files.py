"""Master weights and moments as slices by parameter name: any number of ranks, any stage reads what
any other wrote.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmtune.checkpoint.writer import CheckpointWriter
from llmtune.engine.optimizer_state import (
    STATE_KEYS,
    StateSlice,
    iterate_in_memory,
    make_state,
    slices_to_save,
    state_slices,
    view_state,
    write_state,
)
from llmtune.engine.train_module import TrainModule
from llmtune.errors import CheckpointError
from llmtune.storage import layout
from llmtune.storage.manifest import read_manifest
from llmtune.storage.plain_json import parse_json
from llmtune.storage.safetensors_writer import TensorSpec


@dataclass(frozen=True, slots=True)
class StoredSlice:
    """Elements ``[start, start + numel)`` of a flattened parameter, in one file."""

    file: Path
    start: int
    numel: int


def put_states(module: TrainModule, outbox: CheckpointWriter) -> None:
    """This rank's slices, fp32, one file a rank; the header says which elements they are."""
    pieces = slices_to_save(module)
    where = {piece.name: [piece.start, piece.numel, piece.parameter_numel] for piece in pieces}
    ((name, specs),) = state_specs(module).items()
    outbox.start(name, specs, {layout.STATE_SLICES: json.dumps(where)})
    for batch in iterate_in_memory(module, pieces):
        for piece, kind in product(batch, STATE_KEYS):
            outbox.put(view_state(module, piece, kind))


def state_specs(module: TrainModule) -> dict[str, list[TensorSpec]]:
    """This rank's file, and the tensors in it."""
    specs = [
        TensorSpec(f"{piece.name}/{kind}", torch.float32, (piece.numel,))
        for piece in slices_to_save(module)
        for kind in STATE_KEYS
    ]
    return {layout.state_file(module.rank.rank, module.rank.world_size): specs}


def load_state_files(module: TrainModule, folder: Path, steps: int) -> None:
    """Fill this rank's slices from whatever files cover them.

    Args:
        steps: Optimizer steps that AdamW had counted.

    Raises:
        CheckpointError: A slice is not covered, or a parameter has another size.
    """
    stored = _read_index(folder)
    for batch in iterate_in_memory(module, state_slices(module), write_back=True):
        make_state(module, batch, steps)
        for piece in batch:
            _load_slice(module, piece, stored, folder)


def _load_slice(
    module: TrainModule,
    piece: StateSlice,
    stored: dict[str, tuple[int, list[StoredSlice]]],
    folder: Path,
) -> None:
    sources = stored.get(piece.name)
    if sources is None:
        raise CheckpointError(
            f"{folder}: no optimizer state for {piece.name}; the model or the tuner is another"
        )
    numel, slices = sources
    if numel != piece.parameter_numel:
        raise CheckpointError(
            f"{folder}: {piece.name} has {numel} elements there and {piece.parameter_numel} here"
        )
    for kind in STATE_KEYS:
        values = _assemble(slices, f"{piece.name}/{kind}", piece.start, piece.numel, folder)
        write_state(module, piece, kind, values)


def _read_index(folder: Path) -> dict[str, tuple[int, list[StoredSlice]]]:
    """Parameter name -> its number of elements, and the slices in the files."""
    index: dict[str, list[StoredSlice]] = defaultdict(list)
    numels: dict[str, int] = {}
    for file in sorted(
        folder / name for name in read_manifest(folder)["files"] if layout.is_state_file(name)
    ):
        try:
            with safe_open(str(file), framework="pt") as handle:
                where: dict[str, Any] = parse_json(handle.metadata()[layout.STATE_SLICES])
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{file}: not a state file of llmtune ({error})") from error
        for name, (start, numel, total) in where.items():
            index[name].append(StoredSlice(file, start, numel))
            numels[name] = total
    if not index:
        raise CheckpointError(f"{folder}: holds no optimizer state ({layout.STATE_FILES})")
    return {
        name: (numels[name], sorted(slices, key=lambda s: s.start))
        for name, slices in index.items()
    }


def _assemble(
    slices: list[StoredSlice], key: str, start: int, numel: int, folder: Path
) -> torch.Tensor:
    """Elements ``[start, start + numel)`` put together from the stored slices that overlap them."""
    values = torch.empty(numel)
    filled = 0
    for piece in slices:
        first = max(start, piece.start)
        last = min(start + numel, piece.start + piece.numel)
        if first >= last:
            continue
        with safe_open(str(piece.file), framework="pt") as handle:
            values[first - start : last - start] = handle.get_slice(key)[
                first - piece.start : last - piece.start
            ]
        filled += last - first
    if filled != numel:
        raise CheckpointError(
            f"{folder}: {key} is covered for {filled} of {numel} elements; a state file is missing"
        )
    return values

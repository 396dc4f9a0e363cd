"""Save and load the optimizer's state as slices by parameter name.

Any number of ranks in any ZeRO stage reads what any other wrote.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import torch

from llmtune.checkpoint.stored_states import StoredParameter, read_stored_states
from llmtune.checkpoint.writer import CheckpointWriter
from llmtune.engine.optimizer_state import (
    StateSlice,
    iterate_in_memory,
    make_state,
    slices_to_save,
    state_keys,
    state_slices,
    view_state,
    write_state,
)
from llmtune.engine.train_module import TrainModule
from llmtune.errors import CheckpointError
from llmtune.storage import layout
from llmtune.storage.manifest import read_manifest
from llmtune.storage.tensors.tensor_spec import TensorSpec


def add_states(module: TrainModule, writer: CheckpointWriter) -> None:
    """Add this rank's file: its slices in fp32, and in the header which elements they are."""
    pieces = slices_to_save(module)
    where = {piece.name: [piece.start, piece.numel, piece.parameter_numel] for piece in pieces}
    ((name, specs),) = state_specs(module).items()
    writer.start(name, specs, {layout.STATE_SLICES: json.dumps(where)})
    for batch in iterate_in_memory(module, pieces):
        for piece, kind in product(batch, state_keys(module)):
            writer.add(view_state(module, piece, kind))


def state_specs(module: TrainModule) -> dict[str, list[TensorSpec]]:
    """Return the name of this rank's file, and the tensors in it."""
    specs = [
        TensorSpec(f"{piece.name}/{kind}", torch.float32, (piece.numel,))
        for piece in slices_to_save(module)
        for kind in state_keys(module)
    ]
    return {layout.state_file(module.rank.rank, module.rank.world_size): specs}


def load_state_files(module: TrainModule, folder: Path, steps: int) -> None:
    """Fill this rank's slices from the files that cover them.

    Args:
        steps: Optimizer steps that the optimizer had counted.

    Raises:
        CheckpointError: A file is damaged, a slice is not covered, or a parameter has another size.
    """
    names = read_manifest(folder)["files"]
    stored = read_stored_states(
        folder / name for name in sorted(names) if layout.is_state_file(name)
    )
    if not stored:
        raise CheckpointError(f"{folder}: holds no optimizer state ({layout.STATE_FILES})")
    for batch in iterate_in_memory(module, state_slices(module), write_back=True):
        make_state(module, batch, steps)
        for piece in batch:
            _load_slice(module, piece, stored, folder)


def _load_slice(
    module: TrainModule,
    piece: StateSlice,
    stored: dict[str, StoredParameter],
    folder: Path,
) -> None:
    parameter = stored.get(piece.name)
    if parameter is None:
        raise CheckpointError(
            f"{folder}: no optimizer state for {piece.name}; it was saved with another model or"
            " tuner"
        )
    if parameter.numel != piece.parameter_numel:
        raise CheckpointError(
            f"{folder}: {piece.name} has {parameter.numel} elements there and"
            f" {piece.parameter_numel} here"
        )
    for kind in state_keys(module):
        write_state(module, piece, kind, parameter.read(kind, piece.start, piece.numel))

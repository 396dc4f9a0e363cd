"""Save and load the optimizer's state as slices by parameter name.

Any number of ranks in any ZeRO stage reads what any other wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from llmtune.checkpoint.stored_states import StoredParameter, read_stored_states
from llmtune.checkpoint.writer import CheckpointWriter
from llmtune.engine.optimizer_state import (
    iterate_in_memory,
    make_state,
    slices_to_save,
    state_kinds,
    state_slices,
    state_tensors,
    uncut_numel,
    view_state,
    write_state,
)
from llmtune.engine.state_slices import StateSlice
from llmtune.engine.train_module import TrainModule
from llmtune.errors import CheckpointError
from llmtune.storage import layout
from llmtune.storage.manifest import read_manifest
from llmtune.storage.tensors.tensor_spec import TensorSpec


def add_states(module: TrainModule, writer: CheckpointWriter) -> None:
    """Add this rank's file: its slices, and in the header which elements they are."""
    pieces = slices_to_save(module)
    where = {piece.name: [piece.start, piece.numel, piece.parameter_numel] for piece in pieces}
    ((name, specs),) = state_specs(module).items()
    header = {
        layout.STATE_SLICES: json.dumps(where),
        layout.STATE_STORAGES: json.dumps(_storages(module)),
    }
    writer.start(name, specs, header)
    for batch in iterate_in_memory(module, pieces):
        for piece in batch:
            for tensor in state_tensors(module, piece):
                writer.add(view_state(module, piece, tensor))


def state_specs(module: TrainModule) -> dict[str, list[TensorSpec]]:
    """Return the name of this rank's file, and the tensors in it."""
    specs = [
        TensorSpec(f"{piece.name}/{tensor}", dtype, (numel,))
        for piece in slices_to_save(module)
        for tensor, (dtype, numel) in state_tensors(module, piece).items()
    ]
    return {layout.state_file(module.rank.rank, module.rank.world_size): specs}


def load_state_files(module: TrainModule, folder: Path, steps: int) -> None:
    """Fill this rank's slices from the files that cover them.

    Args:
        steps: Optimizer steps that the optimizer had counted.

    Raises:
        CheckpointError: A file is damaged, a slice is not covered, a parameter has another size, or
            another optimizer wrote them.
    """
    names = read_manifest(folder)["files"]
    stored = read_stored_states(
        folder / name for name in sorted(names) if layout.is_state_file(name)
    )
    if not stored:
        raise CheckpointError(f"{folder}: holds no optimizer state ({layout.STATE_FILES})")
    check_storages(module, stored, folder)
    for batch in iterate_in_memory(module, state_slices(module), write_back=True):
        make_state(module, batch, steps)
        for piece in batch:
            _load_slice(module, piece, stored, folder)


def _storages(module: TrainModule) -> dict[str, str]:
    """Name how each kind of numbers is stored."""
    return {kind: module.optimizer.storage(kind).name for kind in state_kinds(module)}


def check_storages(module: TrainModule, stored: dict[str, StoredParameter], folder: Path) -> None:
    """Refuse the states of another optimizer, and those that it stores otherwise.

    Raises:
        CheckpointError: With both.
    """
    expected = _storages(module)
    for parameter in stored.values():
        for piece in parameter.slices:
            if dict(piece.storages) != expected:
                raise CheckpointError(
                    f"{folder}: its optimizer state is {_describe(piece.storages)};"
                    f" {module.optimizer.title} has {_describe(expected)}. An optimizer resumes"
                    " its own state only: take the optimizer that wrote it, or begin a new run"
                    " from the weights (model.name_or_path)"
                )


def _describe(storages: Mapping[str, str]) -> str:
    return ", ".join(f"{kind} in {storage}" for kind, storage in storages.items())


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
    for kind in state_kinds(module, piece):
        uncut = uncut_numel(module, piece, kind)
        if uncut is None:
            values = parameter.read(kind, piece.start, piece.numel)
        else:
            values = parameter.read_uncut(kind, uncut)
        write_state(module, piece, kind, values)

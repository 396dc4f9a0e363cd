"""The master weights of a full fine-tuning, put together from the slices of the ranks.

The model files of the same checkpoint hold these numbers rounded to the training dtype; where
master weights are bf16, both are the same.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from llmtune.checkpoint.slices import PiecedTensor, TensorSlice, find_gap
from llmtune.checkpoint.stored_states import StoredParameter, map_slices, read_stored_states
from llmtune.errors import CheckpointError, ExportError
from llmtune.export.sources.tensor_source import SafetensorsSource
from llmtune.storage import layout
from llmtune.storage.manifest import read_manifest
from llmtune.storage.tensors.tensor_spec import TensorSpec
from llmtune.units import some


def has_master_weights(folder: Path) -> bool:
    """Return whether a folder is a checkpoint with a whole model and its master weights."""
    return bool(_state_files(folder)) and any(folder.glob("model*.safetensors"))


def find_master_weights(folder: Path) -> Path | None:
    """Find the checkpoint with a trained model's master weights.

    It is the folder itself, or the checkpoint that the result of a run was made from.
    """
    if has_master_weights(folder):
        return folder
    try:
        checkpoint = folder.parent / str(read_manifest(folder).get("from"))
        read_manifest(checkpoint)
    except CheckpointError:
        return None
    return checkpoint if has_master_weights(checkpoint) else None


class MasterWeightsSource:
    """A checkpoint's model in its master weights' dtype, of any stage, ranks and placement."""

    def __init__(self, folder: Path) -> None:
        """Open every file, and read the headers.

        Raises:
            ExportError: A file is missing or damaged, or slices do not make up the parameters of
                the model.
        """
        self.folder = folder
        stored = _read_states(folder)
        if not has_master_weights(folder):
            raise ExportError(
                f"{folder} holds no whole model (model*.safetensors), and so no whole model's"
                " master weights"
            )
        self._model = SafetensorsSource(folder)
        self._masters: dict[str, PiecedTensor] = {}
        self.specs = dict(self._model.specs)

        # Trained parameters are read from the slices, all others from the model files.
        masters = map_slices(stored, layout.MASTER_WEIGHT)
        for name, parameter in stored.items():
            if name not in self.specs:
                raise ExportError(
                    f"{folder}: {name} has master weights and is not in the model files; {_NEXT}"
                )
            dtype = masters[name][0].values.dtype if masters[name] else torch.float32
            spec = replace(self.specs[name], dtype=dtype)
            _check_covered(folder, spec, parameter.numel, masters[name])
            self._masters[name] = PiecedTensor(spec, tuple(masters[name]))
            self.specs[name] = spec

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield trained parameters from the slices, and others from the model files."""
        return self._masters[name].blocks() if name in self._masters else self._model.blocks(name)


_NEXT = "fetch or copy the checkpoint again, or take another with checkpoint="


def _state_files(folder: Path) -> list[Path]:
    return sorted(
        file for file in folder.glob(layout.STATE_FILES) if layout.state_file_ranks(file.name)
    )


def _read_states(folder: Path) -> dict[str, StoredParameter]:
    files = _state_files(folder)
    _check_ranks(folder, files)
    try:
        return read_stored_states(files)
    except CheckpointError as error:
        raise ExportError(f"{error}; {_NEXT}") from error


def _check_ranks(folder: Path, files: list[Path]) -> None:
    """Check that there is one file per rank, all from the same number of ranks."""
    if not files:
        raise ExportError(f"{folder} holds no {layout.STATE_FILES}, and so no master weights")
    names = [layout.state_file_ranks(file.name) for file in files]
    ranks = [name for name in names if name]
    sizes = sorted({world_size for _, world_size in ranks})
    if len(sizes) > 1:
        raise ExportError(
            f"{folder} holds state files of {sizes[0]} and of {sizes[1]} ranks; {_NEXT}"
        )
    stored = {rank for rank, _ in ranks}
    missing = [layout.state_file(rank, sizes[0]) for rank in range(sizes[0]) if rank not in stored]
    if missing:
        raise ExportError(
            f"{folder}: {some(missing)} of {sizes[0]} state files is missing; {_NEXT}"
        )


def _check_covered(folder: Path, spec: TensorSpec, numel: int, pieces: list[TensorSlice]) -> None:
    expected = math.prod(spec.shape)
    if numel != expected:
        raise ExportError(
            f"{folder}: {spec.name} has {expected} elements in the model files and {numel} in its"
            " masters"
        )
    gap = find_gap(pieces, numel)
    if gap:
        raise ExportError(
            f"{folder}: the master weights of {spec.name} are not complete: {gap}; {_NEXT}"
        )

"""``model.pt``: one file with a state dict, which ``torch.load(weights_only=True)`` reads; the
model is never in memory.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from llmtune.config.groups.export import ExportConfig
from llmtune.errors import ExportError
from llmtune.export.model import ExportModel
from llmtune.export.publish.folder import check_room
from llmtune.export.publish.shards import Journal, write_shards
from llmtune.export.sources.tensor_source import SafetensorsSource
from llmtune.export.writers.model_files import (
    copy_model_files,
    update_config,
    update_generation_config,
)

TORCH_FILE = "model.pt"

_WEIGHTS = "weights.tmp"


def write_torch_file(
    export_model: ExportModel, folder: Path, _journal: Journal, config: ExportConfig
) -> None:
    """``model.pt`` beside tokenizer and configuration; tied tensors are in it once, as in
    safetensors.

    Raises:
        ExportError: The disk has no room for the weights twice, or the file that was written is not
            whole.
    """
    weights = folder / _WEIGHTS
    if isinstance(export_model.source, SafetensorsSource):
        source = export_model.source
    else:
        check_room(folder, 2 * export_model.nbytes)
        weights.mkdir(exist_ok=True)
        progress = export_model.request.progress
        write_shards(
            export_model.source,
            weights,
            config.max_shard_bytes,
            Journal(weights, _WEIGHTS),
            progress,
        )
        source = SafetensorsSource(weights)
    # torch.save writes a storage as it lies: from mapped files, page by page.
    torch.save(
        {name: _own_storage(source.tensor(name)) for name in export_model.source.specs},
        folder / TORCH_FILE,
    )
    _check(folder / TORCH_FILE, source)
    del source
    shutil.rmtree(weights, ignore_errors=True)
    copy_model_files(export_model.model_files, folder)
    update_config(folder, export_model.dtype, export_model.config_changes)
    update_generation_config(folder)


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes as a storage that ends where the tensor does; a mapped file is one storage for
    all its tensors.
    """
    if not tensor.numel():
        return torch.empty_like(tensor)
    data = torch.from_numpy(_bits(tensor).numpy())
    return data.view(tensor.dtype).reshape(tensor.shape)


def _check(file: Path, source: SafetensorsSource) -> None:
    """Read back what anyone would, mapped."""
    found = torch.load(file, weights_only=True, mmap=True)
    wrong = [
        name
        for name in source.specs
        if name not in found or not torch.equal(_bits(found[name]), _bits(source.tensor(name)))
    ]
    if wrong or len(found) != len(source.specs):
        raise ExportError(
            f"{file} does not hold what was written: {len(wrong)} of {len(found)} tensors differ"
        )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes compare equal where NaN does not; an empty tensor cannot be seen as bytes."""
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor

"""``model.pt``: one file with a state dict, which ``torch.load(weights_only=True)`` reads.

The model is never in memory as a whole.
"""

import shutil
from pathlib import Path

import torch

from llmtune.config.groups.export import ExportConfig
from llmtune.errors import ExportError
from llmtune.export.export_model import ExportModel
from llmtune.export.publish.folder import check_room
from llmtune.export.publish.shards import Journal, write_shards
from llmtune.export.sources.tensor_source import SafetensorsSource

TORCH_FILE = "model.pt"

#: Folder for the merged weights, which ``torch.save`` then reads as mapped files.
_WEIGHTS_FOLDER = "weights.tmp"


def write_torch_file(
    export_model: ExportModel, folder: Path, _journal: Journal, config: ExportConfig
) -> None:
    """Write ``model.pt``; a tied tensor is in it once, as in safetensors.

    Raises:
        ExportError: The disk has no room for the weights twice, or the file does not hold what was
            written.
    """
    weights = folder / _WEIGHTS_FOLDER
    if isinstance(export_model.source, SafetensorsSource):
        source = export_model.source
    else:
        check_room(folder, 2 * export_model.nbytes)
        weights.mkdir(exist_ok=True)
        write_shards(
            export_model.source,
            weights,
            config.max_shard_bytes,
            Journal(weights, _WEIGHTS_FOLDER),
            export_model.request.progress,
        )
        source = SafetensorsSource(weights)
    # torch.save writes a storage from first to last byte: of mapped files, page by page.
    torch.save(
        {name: _with_own_storage(source.tensor(name)) for name in export_model.source.specs},
        folder / TORCH_FILE,
    )
    _check_file(folder / TORCH_FILE, source)
    del source
    shutil.rmtree(weights, ignore_errors=True)


def _with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same bytes as a storage that ends with the tensor.

    A mapped file is one storage for all of its tensors, and ``torch.save`` writes whole storages.
    """
    if not tensor.numel():
        return torch.empty_like(tensor)
    data = torch.from_numpy(_view_bytes(tensor).numpy())
    return data.view(tensor.dtype).reshape(tensor.shape)


def _check_file(file: Path, source: SafetensorsSource) -> None:
    """Read the file back, mapped, and compare it with the source."""
    stored = torch.load(file, weights_only=True, mmap=True)
    wrong = [
        name
        for name in source.specs
        if name not in stored
        or not torch.equal(_view_bytes(stored[name]), _view_bytes(source.tensor(name)))
    ]
    if wrong or len(stored) != len(source.specs):
        raise ExportError(
            f"{file} does not hold what was written: {len(wrong)} of {len(stored)} tensors differ"
        )


def _view_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """View a tensor as bytes, which compare equal where NaN does not."""
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor

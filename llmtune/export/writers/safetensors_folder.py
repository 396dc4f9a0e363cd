"""The weights of a model folder as transformers and vLLM load them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from llmtune.config.groups.export import ExportConfig
from llmtune.export.model import ExportModel
from llmtune.export.publish.shards import Journal, write_shards
from llmtune.export.sources.tensor_source import SafetensorsSource


def write_safetensors(
    export_model: ExportModel, folder: Path, journal: Journal, config: ExportConfig
) -> None:
    """Write the weights in shards, or link the files of weights that stay as they are."""
    if isinstance(export_model.source, SafetensorsSource):
        _link_weights(export_model.source, folder)
        return
    write_shards(
        export_model.source,
        folder,
        config.max_shard_bytes,
        journal,
        export_model.request.progress,
    )


def _link_weights(source: SafetensorsSource, folder: Path) -> None:
    """Hard-link the source's files; copy them where the file system has no hard links."""
    files = list(source.files)
    index = source.folder / "model.safetensors.index.json"
    if index.is_file():
        files.append(index)
    for file in files:
        (folder / file.name).unlink(missing_ok=True)
        try:
            os.link(file.resolve(), folder / file.name)
        except OSError:
            shutil.copyfile(file, folder / file.name)

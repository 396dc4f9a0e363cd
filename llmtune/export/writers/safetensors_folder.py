"""A model folder as transformers and vLLM load it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from llmtune.config.groups.export import ExportConfig
from llmtune.export.model import ExportModel
from llmtune.export.publish.shards import Journal, write_shards
from llmtune.export.sources.tensor_source import SafetensorsSource
from llmtune.export.writers.model_files import (
    copy_model_files,
    update_config,
    update_generation_config,
)


def write_safetensors(
    export_model: ExportModel, folder: Path, journal: Journal, config: ExportConfig
) -> None:
    """Weights in shards, or links to those that stay as they are, with configuration and
    tokenizer.
    """
    if isinstance(export_model.source, SafetensorsSource):
        _link_weights(export_model.source, folder)
    else:
        write_shards(
            export_model.source,
            folder,
            config.max_shard_bytes,
            journal,
            export_model.request.progress,
        )
    copy_model_files(export_model.model_files, folder)
    update_config(folder, export_model.dtype, export_model.config_changes)
    update_generation_config(folder)


def _link_weights(source: SafetensorsSource, folder: Path) -> None:
    """Weights that stay as they are need no arithmetic: hard links where the file system has
    them.
    """
    index = source.folder / "model.safetensors.index.json"
    for file in [*source.files, *([index] if index.is_file() else [])]:
        (folder / file.name).unlink(missing_ok=True)
        try:
            os.link(file.resolve(), folder / file.name)
        except OSError:
            shutil.copyfile(file, folder / file.name)

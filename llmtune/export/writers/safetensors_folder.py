"""The weights of a model folder as transformers and vLLM load them."""

from pathlib import Path

from llmtune.config.groups.export import ExportConfig
from llmtune.export.export_model import ExportModel
from llmtune.export.publish.shards import Journal, write_shards
from llmtune.export.sources.tensor_source import SafetensorsSource
from llmtune.storage.atomic import link_or_copy
from llmtune.storage.layout import MODEL_INDEX


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
    index = source.folder / MODEL_INDEX
    if index.is_file():
        files.append(index)
    for file in files:
        link_or_copy(file, folder / file.name)

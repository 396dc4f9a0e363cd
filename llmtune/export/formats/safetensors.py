"""``export=safetensors``: a model folder as transformers and vLLM load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.config.groups.export import ExportConfig
from llmtune.export.formats.format import FORMATS, MERGED_OPTIONS, Format
from llmtune.export.usage import Usage, ask, load_model, python_block, serve_with_vllm

if TYPE_CHECKING:
    from llmtune.export.model import ExportModel
    from llmtune.export.publish.shards import Journal


def _write(export_model: ExportModel, folder: Path, journal: Journal, config: ExportConfig) -> None:
    from llmtune.export.writers.safetensors_folder import write_safetensors

    write_safetensors(export_model, folder, journal, config)


def _describe_usage(usage: Usage) -> str:
    return f"With transformers:\n\n{python_block(load_model(usage) + ask(usage))}{serve_with_vllm(usage)}"  # noqa: E501


FORMATS.register(
    Format(
        name="safetensors",
        describe=lambda _: "a model folder in safetensors",
        library="transformers",
        describe_usage=_describe_usage,
        write=_write,
        options=MERGED_OPTIONS | {"dtype", "max_shard_bytes"},
        space=1.0,
        loads_from_hub=True,
        tells_dtype=True,
        is_checked_on_disk=True,
    )
)

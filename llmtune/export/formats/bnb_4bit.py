"""``export=bnb_4bit``: a model folder in bitsandbytes' NF4."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.config.groups.export import ExportConfig
from llmtune.export.formats.format import FORMATS, MERGED_OPTIONS, Format, require_package
from llmtune.export.usage import Usage, ask, load_model, python_block, serve_with_vllm, shell_block

if TYPE_CHECKING:
    from llmtune.export.model import ExportModel
    from llmtune.export.publish.shards import Journal


def _write(export_model: ExportModel, folder: Path, journal: Journal, config: ExportConfig) -> None:
    from llmtune.export.writers.bitsandbytes_folder import write_bnb_4bit

    write_bnb_4bit(export_model, folder, journal, config)


def _check_base(_base: Path) -> None:
    require_package("bitsandbytes", "export=bnb_4bit")


def _describe_usage(usage: Usage) -> str:
    text = "The weights are stored in 4 bits (NF4), for GPUs; transformers needs bitsandbytes to read them.\n\n"  # noqa: E501
    code = python_block(load_model(usage) + ask(usage))
    return f"{text}{shell_block('pip install bitsandbytes')}{code}{serve_with_vllm(usage)}"


FORMATS.register(
    Format(
        name="bnb_4bit",
        describe=lambda _: "a model folder in 4 bits (bitsandbytes NF4)",
        library="transformers",
        describe_usage=_describe_usage,
        write=_write,
        options=MERGED_OPTIONS | {"dtype", "max_shard_bytes"},
        space=0.5,
        loads_from_hub=True,
        check_base=_check_base,
        quantization=lambda _: "4 bits (NF4)",
    )
)

"""``export=adapter``: a copy of the adapter, as peft loads it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.config.groups.export import ExportConfig, ExportDtype
from llmtune.export.formats.format import FORMATS, Format
from llmtune.export.usage import (
    Usage,
    allow_code,
    ask,
    load_tokenizer,
    python_block,
    request_answer,
    shell_block,
)

if TYPE_CHECKING:
    from llmtune.export.model import ExportModel
    from llmtune.export.publish.shards import Journal

#: Ranks that vLLM keeps room for.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

#: What vLLM does not serve.
_UNUSUAL = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias")


def _write(export_model: ExportModel, folder: Path, journal: Journal, config: ExportConfig) -> None:
    from llmtune.export.writers.adapter_folder import write_adapter

    write_adapter(export_model, folder, journal, config)


def _find_problems(config: ExportConfig) -> str | None:
    if config.dtype is ExportDtype.auto:
        return None
    return f"export.dtype={config.dtype.value} has no part in export=adapter: it is copied as it is"


def _describe_usage(usage: Usage) -> str:
    rows = f"base.resize_token_embeddings({usage.base_rows})\n" if usage.base_rows else ""
    load = (
        f"from peft import PeftModel\nfrom transformers import {usage.task.loader}, AutoTokenizer\n\n"  # noqa: E501
        f'base = {usage.task.loader}.from_pretrained({json.dumps(usage.base)}, dtype="auto"{allow_code(usage)})\n{rows}'  # noqa: E501
        f"model = PeftModel.from_pretrained(base, {json.dumps(usage.place)})\n{load_tokenizer(usage)}"  # noqa: E501
    )
    text = f"These are the adapter's weights alone; they need the base.\n\nWith peft:\n\n{python_block(load + ask(usage))}"  # noqa: E501
    if not usage.writes_text or usage.base_rows or any(usage.adapter.get(key) for key in _UNUSUAL):
        return text
    rank = next((size for size in _VLLM_RANKS if size >= int(usage.adapter.get("r") or 1)), None)
    if rank is None:
        return text
    serve = (
        f"vllm serve {shlex.quote(usage.base)} --enable-lora --max-lora-rank {rank} "
        f"--lora-modules {usage.name}={usage.place}\n"
    )
    return f"{text}With vLLM:\n\n{shell_block(serve + request_answer(usage))}"


FORMATS.register(
    Format(
        name="adapter",
        describe=lambda _: "an adapter for peft",
        library="peft",
        describe_usage=_describe_usage,
        write=_write,
        options=frozenset(),
        is_merged=False,
        loads_from_hub=True,
        is_checked_on_disk=True,
        find_problems=_find_problems,
    )
)

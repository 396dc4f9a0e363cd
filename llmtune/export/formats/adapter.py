"""``export=adapter``: a copy of the adapter, as peft loads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtune.config.groups.export import ExportConfig, ExportDtype
from llmtune.export.formats.format import FORMATS, Format, Writer, render_usage

if TYPE_CHECKING:
    from llmtune.export.usage import Usage

#: ``--max-lora-rank`` of vLLM takes these.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

#: Settings of peft that vLLM does not serve.
_NOT_IN_VLLM = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias")


def _load_writer() -> Writer:
    from llmtune.export.writers.adapter_folder import write_adapter

    return write_adapter


def _find_problems(config: ExportConfig) -> str | None:
    if config.dtype is ExportDtype.auto:
        return None
    return f"export.dtype={config.dtype.value} has no part in export=adapter: it is copied as it is"


def _describe_usage(usage: Usage) -> str:
    return render_usage("adapter", usage, vllm_rank=_find_vllm_rank(usage))


def _find_vllm_rank(usage: Usage) -> int | None:
    """Find the smallest rank of vLLM that holds the adapter; None where vLLM does not serve it."""
    is_unusual = any(usage.adapter.get(key) for key in _NOT_IN_VLLM)
    if not usage.writes_text or usage.base_rows or is_unusual:
        return None
    rank = int(usage.adapter.get("r") or 1)
    return next((size for size in _VLLM_RANKS if size >= rank), None)


FORMATS.register(
    Format(
        name="adapter",
        describe=lambda _: "an adapter for peft",
        library="peft",
        describe_usage=_describe_usage,
        load_writer=_load_writer,
        options=frozenset(),
        is_merged=False,
        loads_from_hub=True,
        is_checked_on_disk=True,
        find_problems=_find_problems,
    )
)

"""The small files beside the weights of a checkpoint: configuration and tokenizer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.checkpoint.weight_files import WeightFiles, write_model_config
from llmtune.storage import layout
from llmtune.tuner.peft_model import write_adapter_config
from llmtune.tuner.start_factors import stored_parts
from llmtune.tuner.stored_adapter import to_file_name
from llmtune.tuner.tuner import TUNERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def resolve_weight_files(kind: str, model: Any, max_shard_bytes: int) -> WeightFiles:
    """Say how the weights of a trained model are divided into files.

    Args:
        kind: ``tuner.kind``.
        model: The model, with its adapters.
    """
    if not TUNERS.find(kind).has_adapter:
        return WeightFiles(adapter_only=False, max_shard_bytes=max_shard_bytes)
    return WeightFiles(
        adapter_only=True,
        max_shard_bytes=max_shard_bytes,
        file_name=to_file_name,
        joined=stored_parts(model),
    )


def render_model_files(
    model: Any, tokenizer: PreTrainedTokenizerBase, weights: WeightFiles, run: Path
) -> dict[str, bytes]:
    """Return the contents of these files by name; they are the same in every checkpoint."""
    write_config = write_adapter_config if weights.adapter_only else write_model_config
    with tempfile.TemporaryDirectory(prefix="llmtune-") as name:
        folder = Path(name)
        write_config(model, folder)
        tokenizer.save_pretrained(name)
        files = {
            file.relative_to(folder).as_posix(): file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file()
        }
    return {**files, layout.CONFIG: (run / layout.CONFIG).read_bytes()}

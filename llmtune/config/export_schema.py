"""The keys of ``export``: what is written after training, and by ``llmtune export``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ExportFormat(Enum):
    """What ``export`` writes."""

    none = "none"
    safetensors = "safetensors"
    adapter = "adapter"
    gguf = "gguf"
    onnx = "onnx"
    torchscript = "torchscript"
    pt = "pt"
    bnb_4bit = "bnb_4bit"


class ExportDtype(Enum):
    """What floating tensors are stored in."""

    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class MergeOnto(Enum):
    """Which base a QLoRA adapter is added to."""

    original = "original"
    nf4 = "nf4"


@dataclass(slots=True)
class ExportConfig:
    """What is written after training, and by ``llmtune export``."""

    format: ExportFormat = ExportFormat.safetensors
    """``safetensors`` (a merged model folder), ``adapter`` (a copy of the adapter), ``gguf`` (llama.cpp, Ollama), ``onnx``,
    ``torchscript``, ``pt`` (one weights-only file), ``bnb_4bit`` (bitsandbytes NF4), ``none``."""
    dtype: ExportDtype = ExportDtype.auto
    """``auto`` keeps the base's, which rounds once; a checkpoint of a full fine-tuning has fp32 master weights for ``fp32``."""
    max_shard_bytes: int = 5_000_000_000
    """Largest safetensors file."""
    merge_onto: MergeOnto = MergeOnto.original
    """``nf4``: quantise the base to NF4 and back before adding the adapter, so that it sits on the weights that a QLoRA
    training saw, with their quantisation error; ``original``: add it to the unquantised weights."""

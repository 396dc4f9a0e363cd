"""The keys of ``export``, for the end of training and ``llmtune export``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ExportDtype(Enum):
    """Dtype in which floating-point tensors are stored."""

    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class MergeOnto(Enum):
    """The base weights to which a QLoRA adapter is added."""

    original = "original"
    nf4 = "nf4"


class GgufType(Enum):
    """Type of a GGUF file's matrices; vectors stay fp32, as llama.cpp requires."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q5_1 = "q5_1"
    q5_0 = "q5_0"
    q4_1 = "q4_1"
    q4_0 = "q4_0"


@dataclass(slots=True, kw_only=True)
class ExportConfig:
    """Format, checks and upload of what is written after training and by ``llmtune export``."""

    format: str = "safetensors"
    """Format of the exported files.

    ``safetensors`` (a merged model folder), ``adapter`` (a copy of the adapter), ``gguf``
    (llama.cpp, Ollama), ``onnx``, ``torchscript``, ``pt`` (one weights-only file), ``bnb_4bit``
    (bitsandbytes NF4), ``none``.
    """
    dtype: ExportDtype = ExportDtype.auto
    """Dtype of the weights; ``auto`` keeps the base's, which rounds once.

    A checkpoint of a full fine-tuning has fp32 master weights for ``fp32``.
    """
    max_shard_bytes: int = 5_000_000_000
    """Largest safetensors file."""
    merge_onto: MergeOnto = MergeOnto.original
    """Base weights to which a QLoRA adapter is added: ``nf4`` or ``original``.

    ``nf4`` quantizes the base to NF4 and back first, so that the adapter is added to the weights of
    the training, with their quantization error. ``original`` takes the unquantized weights.
    """
    gguf_type: GgufType = GgufType.f16
    """Type of ``export=gguf``: ``f32 f16 bf16``, or quantized: ``q8_0 q5_1 q5_0 q4_1 q4_0``."""
    parity: bool = True
    """Compare every written number, and the logits, with base and adapter before publishing."""
    parity_bound: float | None = None
    """Largest allowed relative difference of the logits.

    The default is what rounding to the stored dtype explains.
    """
    upload: str | None = None
    """URL that the published folder is copied to: ``hf://user/name``, ``s3://bucket/path`` ...."""
    upload_private: bool = True
    """Make a new hub repository private."""
    dry_run: bool = False
    """Write and upload nothing; report what would be, from what, and its size."""

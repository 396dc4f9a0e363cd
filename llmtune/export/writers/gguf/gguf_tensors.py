"""The tensors of a GGUF file: their names, their types, and the conversion of their numbers.

llama.cpp stores the rows of Llama's query and key projections in another order than transformers:
pairs that rotate together are side by side, where transformers has them half a head apart.
"""

import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    get_tensor_name_map,
    quants,
)

from llmtune.config.groups.export import GgufType
from llmtune.errors import ExportError
from llmtune.export.sources.tensor_source import TensorSource
from llmtune.units import some

#: Tensors of every layer of every architecture, and those of some.
_LAYER = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)
_LAYER_MORE = {"llama": (), "qwen2": (), "qwen3": ("attn_q_norm", "attn_k_norm")}

#: Buffers that old files carry along; nothing loads them.
_LEFT_OUT = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")

#: Elements of a quantized block; rows that are no multiple of it are stored in f16, as llama.cpp
#: does.
_BLOCK = 32
#: Elements quantized at once: they stay in the processor's cache.
_CHUNK = 1 << 16
_COARSE = (GgufType.q5_1, GgufType.q5_0, GgufType.q4_1, GgufType.q4_0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor of the file."""

    name: str
    source: str
    """Its name in the model."""
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    heads: int | None = None
    """Number of heads of a query or key projection whose rows are reordered; None for others."""

    @property
    def nbytes(self) -> int:
        """Size of the stored data in bytes."""
        elements, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // elements * size


def plan_tensors(
    source: TensorSource, settings: Any, architecture: str, gguf_type: GgufType
) -> tuple[list[GgufTensor], list[str]]:
    """Choose name and type of every tensor.

    Returns:
        The tensors in the order in which they are written, and notes for the user.

    Raises:
        ExportError: A tensor is missing, or the architecture has no such tensor.
    """
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, settings.num_hidden_layers)

    # Name, type and order of rows of each tensor, by llama.cpp's own table.
    tied = bool(settings.tie_word_embeddings)
    tensors: list[GgufTensor] = []
    unknown: list[str] = []
    notes: list[str] = []
    for name, spec in source.specs.items():
        if name.endswith(_LEFT_OUT) or (tied and name == "lm_head.weight"):
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None or not spec.dtype.is_floating_point:
            unknown.append(name)
            continue
        heads = _rotated_heads(stored, settings) if architecture == "llama" else None
        kind = _choose_type(stored, spec.shape, tied, gguf_type)
        tensors.append(
            GgufTensor(name=stored, source=name, shape=spec.shape, kind=kind, heads=heads)
        )
    if unknown:
        raise ExportError(
            f"export=gguf: llama.cpp's {architecture} has no place for {some(unknown)}"
        )
    _check_complete({tensor.name for tensor in tensors}, settings, architecture)

    # Rows that no quantized block divides.
    indivisible = [
        tensor.name
        for tensor in tensors
        if len(tensor.shape) > 1 and gguf_type.value.startswith("q") and tensor.shape[-1] % _BLOCK
    ]
    if indivisible:
        notes.append(
            f"rows of {some(indivisible)} are no multiple of {_BLOCK} numbers: stored in f16, not"
            f" in {gguf_type.value}"
        )
    return tensors, notes


def _choose_type(
    name: str, shape: tuple[int, ...], tied: bool, gguf_type: GgufType
) -> GGMLQuantizationType:
    """Choose the type of one tensor as llama.cpp's own quantizer does."""
    kind = gguf_type
    if gguf_type in _COARSE and name == ("token_embd.weight" if tied else "output.weight"):
        # The matrix of the logits is worth more bits.
        kind = GgufType.q8_0
    if len(shape) < 2:
        kind = GgufType.f32
    elif kind.value.startswith("q") and shape[-1] % _BLOCK:
        kind = GgufType.f16
    return GGMLQuantizationType[kind.name.upper()]


def _rotated_heads(name: str, settings: Any) -> int | None:
    if ".attn_q." in name:
        return int(settings.num_attention_heads)
    return int(settings.num_key_value_heads) if ".attn_k." in name else None


def _check_complete(names: set[str], settings: Any, architecture: str) -> None:
    needed = ["token_embd.weight", "output_norm.weight"]
    if not settings.tie_word_embeddings:
        needed.append("output.weight")
    for layer in range(settings.num_hidden_layers):
        needed += [f"blk.{layer}.{part}.weight" for part in (*_LAYER, *_LAYER_MORE[architecture])]
    missing = [name for name in needed if name not in names]
    if missing:
        raise ExportError(
            f"export=gguf: llama.cpp's {architecture} needs {some(missing)}, which the model does"
            " not have"
        )


def convert_tensors(
    source: TensorSource, tensors: list[GgufTensor]
) -> Iterator[np.ndarray[Any, Any] | None]:
    """Yield the data of every tensor in order, and None behind each tensor.

    The calling thread reads the source; other threads quantize a few blocks ahead of it.
    """
    cores = len(os.sched_getaffinity(0))
    pending: deque[Future[np.ndarray[Any, Any]] | None] = deque()
    with ThreadPoolExecutor(cores) as pool:
        for tensor in tensors:
            for rows in _reordered_rows(source, tensor):
                pending.append(pool.submit(convert, rows, tensor))
                while len(pending) > cores + 1:
                    future = pending.popleft()
                    yield future.result() if future else None
            pending.append(None)
        for future in pending:
            yield future.result() if future else None


def _reordered_rows(source: TensorSource, tensor: GgufTensor) -> Iterator[torch.Tensor]:
    """Yield blocks of rows; a projection whose rows are reordered comes in one block."""
    if tensor.heads is None:
        yield from source.blocks(tensor.source)
        return
    weight = torch.cat(list(source.blocks(tensor.source)))
    halves = weight.reshape(tensor.heads, 2, -1, *weight.shape[1:])
    yield halves.swapaxes(1, 2).reshape(weight.shape)


def convert(rows: torch.Tensor, tensor: GgufTensor) -> np.ndarray[Any, Any]:
    """Convert numbers to the type in the file; the result has one dimension.

    Raises:
        ExportError: A number is too large for f16.
    """
    rows = rows.detach().cpu()
    if tensor.kind is GGMLQuantizationType.F32:
        return rows.to(torch.float32).contiguous().reshape(-1).numpy()
    if tensor.kind is GGMLQuantizationType.BF16:
        return rows.to(torch.bfloat16).contiguous().reshape(-1).view(torch.int16).numpy()
    if tensor.kind is GGMLQuantizationType.F16:
        narrow = rows.to(torch.float16)
        if not bool(narrow.isfinite().all()):
            raise ExportError(
                f"export=gguf: {tensor.source} has numbers that f16 cannot hold (up to"
                f" {float(rows.abs().max()):.4g}); take export.gguf_type=bf16 or f32"
            )
        return narrow.contiguous().reshape(-1).numpy()
    # Quantized blocks do not depend on where rows end.
    flat = rows.to(torch.float32).contiguous().reshape(-1).numpy()
    chunks = [flat[first : first + _CHUNK].reshape(1, -1) for first in range(0, len(flat), _CHUNK)]
    return np.concatenate([quants.quantize(chunk, tensor.kind).reshape(-1) for chunk in chunks])

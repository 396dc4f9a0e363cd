"""GGUF, the one file that llama.cpp, Ollama and LM Studio load: tensors renamed, quantized and
written as a stream.

Which tensors and keys an architecture has, and that the rows of the query and key projections of
Llama are in another order (pairs that rotate together lie side by side, where transformers has them
half a head apart), is llama.cpp's own convention.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmtune.config.groups.export import ExportConfig, GgufType
from llmtune.errors import ExportError
from llmtune.export.model import ExportModel
from llmtune.export.publish.folder import check_room
from llmtune.export.publish.shards import Journal
from llmtune.export.sources.base import TensorSource, some
from llmtune.export.writers.gguf.vocabulary import Vocabulary, add_vocabulary, read_vocabulary
from llmtune.export.writers.model_files import copy_companions, update_config
from llmtune.storage import layout
from llmtune.storage.manifest import flush, hash_file

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

#: transformers' class -> llama.cpp's architecture.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

#: What every layer of every one of them has, and what some have besides.
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

#: Buffers that old files carry along; nobody loads them.
_LEFT_OUT = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")

_PIECE = 1 << 16
_COARSE = (GgufType.q5_1, GgufType.q5_0, GgufType.q4_1, GgufType.q4_0)

#: Header: tokens, merges and the chat template.
_HEADER_BYTES = 64 << 20
_COMPANIONS = "companions.tmp"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of the file."""

    name: str
    source: str
    """Its name in the model."""
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    heads: int | None = None
    """Of a query or key projection whose rows change places; None where they stay."""

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        from gguf import GGML_QUANT_SIZES

        elements, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // elements * size


def write_gguf(
    export_model: ExportModel, folder: Path, journal: Journal, config: ExportConfig
) -> None:
    """``model-<type>.gguf`` and a ``Modelfile`` for Ollama.

    Numbers are rounded once, from what the source gives to the type in the file; ``export.dtype``
    has no part in it.

    Raises:
        ExportError: llama.cpp has no such architecture, tensor, rope scaling or tokenizer, or would
            read it otherwise.
    """
    file = folder / f"model-{config.gguf_type.value}.gguf"
    model_files = folder / _COMPANIONS
    shutil.rmtree(model_files, ignore_errors=True)
    model_files.mkdir()
    try:
        copy_companions(export_model.model_files, model_files)
        update_config(model_files, None, export_model.config_changes)
        settings, architecture = read_settings(model_files)
        tensors, notes = plan_tensors(export_model.source, settings, architecture, config.gguf_type)
        rows = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
        vocabulary = read_vocabulary(model_files, rows)
    finally:
        shutil.rmtree(model_files)
    notes += vocabulary.notes
    window = getattr(settings, "sliding_window", None)
    if window:
        notes.append(
            f"llama.cpp looks at the whole text, where the model has a window of {window} tokens"
        )
    for note in notes:
        export_model.request.say(f"{file.name}: {note}")
    if file.name not in journal.entries:
        check_room(folder, sum(tensor.nbytes for tensor in tensors) + _HEADER_BYTES)
        _write_file(
            file, export_model, tensors, (architecture, settings, vocabulary, config.gguf_type)
        )
        flush(file)
        journal.note(file.name, hash_file(file))
    elif export_model.request.progress:
        export_model.request.progress.total(journal.entries[file.name]["size"])
        export_model.request.progress.done(journal.entries[file.name]["size"])
    (folder / "Modelfile").write_text(
        _modelfile(file.name, vocabulary.stops, notes), encoding="utf-8"
    )


def read_settings(folder: Path) -> tuple[Any, str]:
    """The model's configuration, and what llama.cpp calls its architecture.

    Raises:
        ExportError: llama.cpp cannot run it, or not as transformers does.
    """
    from transformers import AutoConfig

    try:
        settings: Any = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ExportError(f"export=gguf needs the model's config.json ({error})") from error
    name = (getattr(settings, "architectures", None) or ["(none named in config.json)"])[0]
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise ExportError(
            f"export=gguf cannot write {name}; it can write {', '.join(ARCHITECTURES)}. "
            "For others, export=safetensors and llama.cpp's own convert_hf_to_gguf.py"
        )
    if settings.hidden_act not in ("silu", "swish"):
        raise ExportError(
            f"export=gguf: hidden_act={settings.hidden_act!r}; llama.cpp computes {name} with silu"
        )
    rope = settings.rope_parameters
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError(
            f"export=gguf: partial_rotary_factor={rope['partial_rotary_factor']}; llama.cpp rotates"
            " whole heads"
        )
    allowed = ["default", "linear", "yarn"] + (["llama3"] if architecture == "llama" else [])
    if rope["rope_type"] not in allowed or rope.get("truncate") is False:
        raise ExportError(
            f"export=gguf: rope_parameters={rope}; for {name} it can write {', '.join(allowed)}"
        )
    return settings, architecture


def plan_tensors(
    source: TensorSource, settings: Any, architecture: str, wanted: GgufType
) -> tuple[list[StoredTensor], list[str]]:
    """What is written, in order, and what the user should know of it.

    Raises:
        ExportError: A tensor is missing, or is none of the architecture's.
    """
    from gguf import (
        GGML_QUANT_SIZES,
        MODEL_ARCH_NAMES,
        GGMLQuantizationType,
        get_tensor_name_map,
    )

    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(number, settings.num_hidden_layers)
    tied = bool(settings.tie_word_embeddings)
    tensors, unknown, fallen = [], [], []
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[wanted.name.upper()]]
    for name, spec in source.specs.items():
        if name.endswith(_LEFT_OUT) or (tied and name == "lm_head.weight"):
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None or not spec.dtype.is_floating_point:
            unknown.append(name)
            continue
        kind = wanted
        if wanted in _COARSE and stored == ("token_embd.weight" if tied else "output.weight"):
            # What the logits come from is worth more bits, as llama.cpp's own quantizer holds it.
            kind = GgufType.q8_0
        if len(spec.shape) < 2:
            kind = GgufType.f32
        elif spec.shape[-1] % block:
            # As llama.cpp does.
            fallen.append(stored)
            kind = GgufType.f16
        heads = _rotated_heads(stored, settings) if architecture == "llama" else None
        tensors.append(
            StoredTensor(
                name=stored,
                source=name,
                shape=spec.shape,
                kind=GGMLQuantizationType[kind.name.upper()],
                heads=heads,
            )
        )
    if unknown:
        raise ExportError(
            f"export=gguf: llama.cpp's {architecture} has no place for {some(unknown)}"
        )
    _check_complete({tensor.name for tensor in tensors}, settings, architecture)
    notes = []
    if fallen:
        notes.append(
            f"rows of {some(fallen)} are no multiple of {block} numbers: stored in f16, not in"
            f" {wanted.value}"
        )
    return tensors, notes


def _rotated_heads(name: str, settings: Any) -> int | None:
    if ".attn_q." in name:
        return int(settings.num_attention_heads)
    return int(settings.num_key_value_heads) if ".attn_k." in name else None


def _check_complete(found: set[str], settings: Any, architecture: str) -> None:
    needed = ["token_embd.weight", "output_norm.weight"]
    needed += [] if settings.tie_word_embeddings else ["output.weight"]
    for layer in range(settings.num_hidden_layers):
        needed += [f"blk.{layer}.{part}.weight" for part in (*_LAYER, *_LAYER_MORE[architecture])]
    missing = [name for name in needed if name not in found]
    if missing:
        raise ExportError(
            f"export=gguf: llama.cpp's {architecture} needs {some(missing)}, which the model does"
            " not have"
        )


def _write_file(
    file: Path,
    export_model: ExportModel,
    tensors: list[StoredTensor],
    about: tuple[str, Any, Vocabulary, GgufType],
) -> None:
    """Keys first, then the tensors one after the other."""
    import numpy as np
    from gguf import GGUFWriter

    architecture, settings, vocabulary, wanted = about
    writer = GGUFWriter(file, architecture)
    _add_about(writer, export_model)
    add_settings(writer, settings, wanted)
    writer.add_vocab_size(len(vocabulary.tokens))
    add_vocabulary(writer, vocabulary)
    frequencies = rope_factors(settings)
    if frequencies is not None:
        writer.add_tensor_info(
            "rope_freqs.weight", frequencies.shape, frequencies.dtype, frequencies.nbytes
        )
    for tensor in tensors:
        # The dtype of the array plays no part where the type in the file is named.
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        out, progress = writer.fout[0], export_model.request.progress
        if progress:
            progress.total(sum(tensor.nbytes for tensor in tensors))
        writer.write_padding(out, out.tell())
        if frequencies is not None:
            frequencies.tofile(out)
        for data in _converted(export_model.source, tensors):
            if data is None:
                writer.write_padding(out, out.tell())
                continue
            data.tofile(out)
            if progress:
                progress.done(data.nbytes)
        writer.write_padding(out, out.tell())
    finally:
        writer.close()


def _add_about(writer: GGUFWriter, export_model: ExportModel) -> None:
    from gguf import GGML_QUANT_VERSION

    output = export_model.request.output
    writer.add_type("model")
    own_name = output == layout.export_folder(output.parent, "gguf")
    writer.add_name(output.parent.name if own_name else output.name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, export_model.request.base_name)
    writer.add_quantization_version(GGML_QUANT_VERSION)


def add_settings(writer: GGUFWriter, settings: Any, wanted: GgufType) -> None:
    """The numbers of the architecture."""
    from gguf import LlamaFileType, RopeScalingType

    heads = settings.num_attention_heads
    # Of these architectures some leave it out of their configuration.
    head = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    rope = settings.rope_parameters
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_file_type(
        LlamaFileType["ALL_F32" if wanted is GgufType.f32 else f"MOSTLY_{wanted.name.upper()}"]
    )
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1)
        # llama.cpp multiplies its own factor, which is the paper's, by this one.
        paper = 1.0 + 0.1 * math.log(rope["factor"])
        writer.add_rope_scaling_attn_factors(ROPE_INIT_FUNCTIONS["yarn"](settings, None)[1] / paper)


def rope_factors(settings: Any) -> np.ndarray[Any, Any] | None:
    """What Llama 3.1 and later divide each rotation's frequency by; None for others."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if settings.rope_parameters["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](settings, torch.device("cpu"))
    head = (
        getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    )
    plain = 1.0 / settings.rope_parameters["rope_theta"] ** (
        torch.arange(0, head, 2, dtype=torch.float32) / head
    )
    return (plain / scaled).to(torch.float32).numpy()


def _converted(
    source: TensorSource, tensors: list[StoredTensor]
) -> Iterator[np.ndarray[Any, Any] | None]:
    """The bytes of every tensor in order, and None behind each; a few blocks ahead are quantized by
    other threads.
    """
    cores = len(os.sched_getaffinity(0))
    waiting: deque[Future[np.ndarray[Any, Any]] | None] = deque()
    with ThreadPoolExecutor(cores) as pool:
        for tensor in tensors:
            for rows in _rows(source, tensor):
                waiting.append(pool.submit(convert, rows, tensor))
                while len(waiting) > cores + 1:
                    future = waiting.popleft()
                    yield future.result() if future else None
            waiting.append(None)
        for future in waiting:
            yield future.result() if future else None


def _rows(source: TensorSource, tensor: StoredTensor) -> Iterator[torch.Tensor]:
    """Blocks of rows; a projection that is turned comes whole."""
    if tensor.heads is None:
        yield from source.blocks(tensor.source)
        return
    whole = torch.cat(list(source.blocks(tensor.source)))
    yield whole.reshape(tensor.heads, 2, -1, *whole.shape[1:]).swapaxes(1, 2).reshape(whole.shape)


def convert(rows: torch.Tensor, tensor: StoredTensor) -> np.ndarray[Any, Any]:
    """Numbers as the type in the file has them, flat.

    Raises:
        ExportError: A number is too large for f16.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, quants

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
    # Blocks do not see where rows end; pieces of this length stay in the processor's cache.
    flat = rows.to(torch.float32).contiguous().reshape(-1).numpy()
    pieces = [flat[first : first + _PIECE].reshape(1, -1) for first in range(0, len(flat), _PIECE)]
    return np.concatenate([quants.quantize(piece, tensor.kind).reshape(-1) for piece in pieces])


def _modelfile(name: str, stops: list[str], notes: list[str]) -> str:
    """For ``ollama create``; the chat template is in the GGUF file."""
    lines = [f"# {note}" for note in notes] + [f"FROM ./{name}"]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    return "\n".join(lines) + "\n"

"""Write the weights of a model in bitsandbytes' 4 bits, as a stream.

The layout is that of transformers' ``save_pretrained``: ``X.weight`` holds two numbers per byte,
and beside it are ``X.weight.absmax``, ``.quant_map``, ``.nested_absmax``, ``.nested_quant_map`` and
``.quant_state.bitsandbytes__nf4``.
"""

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from llmtune.config.groups.export import ExportConfig
from llmtune.export.export_model import ExportModel
from llmtune.export.publish.shards import Journal, write_shards
from llmtune.export.sources.nf4 import (
    check_quantizable,
    mean_scale,
    quantize,
    quantized_names,
)
from llmtune.export.sources.tensor_source import TensorSource
from llmtune.model.nf4.nf4_slices import load_bitsandbytes
from llmtune.storage.atomic import write_atomically
from llmtune.storage.hashing import hash_file
from llmtune.storage.plain_json import parse_json
from llmtune.storage.tensors.row_blocks import row_ranges
from llmtune.storage.tensors.tensor_spec import TensorSpec
from llmtune.tuner.nf4_layout import BLOCK_SIZE, NESTED_BLOCK_SIZE

_STATE = "quant_state.bitsandbytes__nf4"

#: File for the means of the scales, computed before the first shard; no part of the export.
_OFFSETS_FILE = "nf4_offsets.json"


class Nf4PackedSource:
    """Another source with some tensors packed as NF4, under the names that transformers uses."""

    def __init__(
        self, source: TensorSource, names: Mapping[str, bool], offsets: Mapping[str, float]
    ) -> None:
        """Lay out the stored tensors.

        Args:
            names: From :func:`llmtune.export.sources.nf4.quantized_names`.
            offsets: The mean of each tensor's scales; it is stored as text, whose length must be
                known for the file's header.

        Raises:
            ExportError: A tensor cannot be quantized.
        """
        check_quantizable(source, names)
        self._source = source
        self._names = dict(names)
        self._offsets = dict(offsets)
        self._states = {name: self._describe(name) for name in names}
        self._parts: dict[str, tuple[str, str]] = {}
        self._last = threading.local()
        self.specs: dict[str, TensorSpec] = {}
        for spec in source.specs.values():
            if spec.name not in names:
                self._add(spec.name, "", spec.dtype, spec.shape)
                continue
            for part, dtype, shape in self._layout(spec):
                self._add(spec.name, part, dtype, shape)
        # Texts have odd lengths: at the end they leave all other tensors aligned to their dtype.
        for name, text in self._states.items():
            self._add(name, _STATE, torch.uint8, tuple(text.shape))

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield packed bytes; other tensors as the source gives them."""
        weight, part = self._parts[name]
        if weight not in self._names:
            yield from self._source.blocks(weight)
        elif part == _STATE:
            yield self._states[weight]
        else:
            tensor = self._quantized(weight)[part]
            for first, last in row_ranges(tuple(tensor.shape)):
                yield tensor[first:last]

    def _quantized(self, weight: str) -> dict[str, torch.Tensor]:
        """Quantize one tensor; each thread keeps the last, whose parts are written in sequence."""
        if getattr(self._last, "weight", None) != weight:
            self._last.weight, self._last.parts = None, {}
            packed, state = quantize(
                self._source, weight, self._names[weight], offset=self._offsets[weight]
            )
            self._last.parts = {"": packed, **state.as_dict(packed=True)}
            self._last.weight = weight
        parts: dict[str, torch.Tensor] = self._last.parts
        return parts

    def _add(self, weight: str, part: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        name = f"{weight}.{part}" if part else weight
        self.specs[name] = TensorSpec(name, dtype, shape)
        self._parts[name] = (weight, part)

    def _layout(self, spec: TensorSpec) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Return all parts but the text, whose sizes follow from the shape; finer dtypes first."""
        elements = spec.nbytes // spec.dtype.itemsize
        blocks = -(-elements // BLOCK_SIZE)
        return [
            ("nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCK_SIZE),)),
            ("nested_quant_map", torch.float32, (256,)),
            ("quant_map", torch.float32, (16,)),
            ("", torch.uint8, (-(-elements // 2), 1)),
            ("absmax", torch.uint8, (blocks,)),
        ]

    def _describe(self, name: str) -> torch.Tensor:
        """Return what bitsandbytes stores as text: shape, dtype, block sizes and the mean."""
        state = load_bitsandbytes().QuantState
        nothing = torch.empty(0)
        spec = self._source.specs[name]
        described: dict[str, torch.Tensor] = state(
            absmax=nothing,
            shape=torch.Size(spec.shape[::-1] if self._names[name] else spec.shape),
            code=nothing,
            blocksize=BLOCK_SIZE,
            quant_type="nf4",
            dtype=spec.dtype,
            offset=torch.tensor(self._offsets[name]),
            state2=state(
                absmax=nothing, code=nothing, blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32
            ),
        ).as_dict(packed=True)
        return described[_STATE]


def write_bnb_4bit(
    export_model: ExportModel, folder: Path, journal: Journal, config: ExportConfig
) -> None:
    """Write weights with the same bits that transformers computes when it quantizes on loading.

    All tensors are read twice: the first time for the means of their scales, which this layout
    stores as text.
    """
    # By the configuration of the merged model: an adapter may have untied the output layer or
    # resized the vocabulary.
    names = quantized_names(folder, export_model.source)
    offsets = _resolve_offsets(export_model.source, names, folder, journal)
    packed = Nf4PackedSource(export_model.source, names, offsets)
    write_shards(packed, folder, config.max_shard_bytes, journal, export_model.request.progress)
    _add_quantization_config(folder, export_model.dtype)
    (folder / _OFFSETS_FILE).unlink()


def _resolve_offsets(
    source: TensorSource, names: Mapping[str, bool], folder: Path, journal: Journal
) -> dict[str, float]:
    """Compute the mean of each tensor's scales, or read what a killed attempt left on the disk."""
    check_quantizable(source, names)
    file = folder / _OFFSETS_FILE
    if _OFFSETS_FILE not in journal.entries:
        means = {name: mean_scale(source, name, transposed) for name, transposed in names.items()}
        write_atomically(file, json.dumps(means))
        journal.note(_OFFSETS_FILE, hash_file(file))
    offsets: dict[str, float] = parse_json(file.read_text())
    return offsets


def _add_quantization_config(folder: Path, dtype: torch.dtype | None) -> None:
    """Describe the quantization in ``config.json``; the dtype of computing is fp16 or bf16."""
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16 if dtype == torch.float16 else torch.bfloat16,
    )
    file = folder / "config.json"
    described = {**parse_json(file.read_text()), "quantization_config": settings.to_dict()}
    file.write_text(json.dumps(described, indent=2) + "\n")

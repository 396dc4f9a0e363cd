"""Write a model folder in bitsandbytes' 4 bits, as a stream.

The layout is that of transformers' ``save_pretrained``: ``X.weight`` holds two numbers a byte, and
beside it lie ``X.weight.absmax``, ``.quant_map``, ``.nested_absmax``, ``.nested_quant_map`` and
``.quant_state.bitsandbytes__nf4``.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from llmtune.config.groups.export import ExportConfig
from llmtune.export.model import ExportModel
from llmtune.export.publish.shards import Journal, write_shards
from llmtune.export.sources.nf4 import (
    BLOCK_SIZE,
    NESTED_BLOCK_SIZE,
    check_quantizable,
    load_bitsandbytes,
    mean_scale,
    quantize,
    quantized_names,
)
from llmtune.export.sources.tensor_source import TensorSource
from llmtune.export.writers.model_files import (
    copy_model_files,
    update_config,
    update_generation_config,
)
from llmtune.storage.manifest import flush, hash_file
from llmtune.storage.plain_json import parse_json
from llmtune.storage.row_blocks import row_ranges
from llmtune.storage.safetensors_writer import TensorSpec

_STATE = "quant_state.bitsandbytes__nf4"

#: Means of scales, found before the first shard; no part of the export.
_OFFSETS = "nf4_offsets.json"


class Nf4PackedSource:
    """Another source with some of its tensors in NF4, named, typed and packed as transformers
    stores them.
    """

    def __init__(
        self, source: TensorSource, names: Mapping[str, bool], offsets: Mapping[str, float]
    ) -> None:
        """Say what will be written.

        Args:
            names: From :func:`llmtune.export.sources.nf4.quantized_names`.
            offsets: The mean of each one's scales; it is stored as text, whose length the file's
                header must know.

        Raises:
            ExportError: Something cannot be quantized.
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
            for part, dtype, shape in (
                self._layout(spec) if spec.name in names else [("", spec.dtype, spec.shape)]
            ):
                self._add(spec.name, part, dtype, shape)
        # Texts have odd lengths: at the end they leave every other tensor where its dtype wants to
        # be.
        for name, text in self._states.items():
            self._add(name, _STATE, torch.uint8, tuple(text.shape))

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Bytes of what is packed; other tensors as the source gives them."""
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
        """All parts of one tensor; each thread keeps its last, since they are written one after the
        other.
        """
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
        """Parts but the text, with sizes that follow from the shape; finer dtypes first."""
        blocks = -(-(spec.nbytes // spec.dtype.itemsize) // BLOCK_SIZE)
        return [
            ("nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCK_SIZE),)),
            ("nested_quant_map", torch.float32, (256,)),
            ("quant_map", torch.float32, (16,)),
            ("", torch.uint8, (-(-(spec.nbytes // spec.dtype.itemsize) // 2), 1)),
            ("absmax", torch.uint8, (blocks,)),
        ]

    def _describe(self, name: str) -> torch.Tensor:
        """What bitsandbytes writes as text: shape, dtype, block sizes and the mean."""
        state, nothing, spec = (
            load_bitsandbytes().QuantState,
            torch.empty(0),
            self._source.specs[name],
        )
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
    """A model folder that transformers loads in 4 bits, with the bits of a model that it quantizes
    on loading.

    All tensors are read twice: first for the means of their scales, which files of this layout
    store as text.
    """
    copy_model_files(export_model.model_files, folder)
    update_config(folder, export_model.dtype, export_model.config_changes)
    # Of the settled configuration: an adapter may have untied the output layer or resized the
    # vocabulary.
    names = quantized_names(folder, export_model.source)
    offsets = _settle_offsets(export_model.source, names, folder, journal)
    packed = Nf4PackedSource(export_model.source, names, offsets)
    write_shards(packed, folder, config.max_shard_bytes, journal, export_model.request.progress)
    _declare(folder, export_model.dtype)
    update_generation_config(folder)
    (folder / _OFFSETS).unlink()


def _settle_offsets(
    source: TensorSource, names: Mapping[str, bool], folder: Path, journal: Journal
) -> dict[str, float]:
    """The mean of each tensor's scales; a start that was killed after it found them left them in
    the journal.
    """
    check_quantizable(source, names)
    file = folder / _OFFSETS
    if _OFFSETS not in journal.entries:
        found = {name: mean_scale(source, name, transposed) for name, transposed in names.items()}
        file.write_text(json.dumps(found))
        flush(file)
        journal.note(_OFFSETS, hash_file(file))
    offsets: dict[str, float] = parse_json(file.read_text())
    return offsets


def _declare(folder: Path, dtype: torch.dtype | None) -> None:
    """Say in ``config.json`` how to load it: computed is in the dtype of the tensors that are not
    quantized, if that is fp16.
    """
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

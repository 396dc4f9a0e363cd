"""What must hold before anything is published: others can load it, and it computes what was
trained.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from llmtune.config.groups.export import ExportConfig
from llmtune.errors import ExportError
from llmtune.export.architecture import is_renamed
from llmtune.export.formats.format import find_format
from llmtune.export.model import ExportModel
from llmtune.export.sources.tensor_source import (
    FilteredSource,
    RetypedSource,
    SafetensorsSource,
    TensorSource,
    is_input_embedding,
    usual_dtype,
)
from llmtune.export.verify.parity import (
    ComparedModels,
    Parity,
    compare_weights,
    measure_parity,
    measure_parity_in_memory,
    probe_tokens,
)
from llmtune.export.verify.serving_checks import check_export
from llmtune.export.writers.model_files import copy_model_files, update_config
from llmtune.units import format_bytes

#: Two models in fp32, one after the other, and what computing takes.
_WHOLE_BYTES_PER_BYTE = 3


def verify_written_folder(
    export_model: ExportModel, folder: Path, config: ExportConfig
) -> Parity | None:
    """Check a model folder that was written aside; None where there was nothing to compare.

    Raises:
        ExportError: It would be refused by what serves it, or is another model.
    """
    return _check(export_model, folder, SafetensorsSource(folder), config)


def verify_merged_model(export_model: ExportModel, config: ExportConfig) -> Parity | None:
    """The same for a model that is going to be written in a format that transformers does not read.

    Raises:
        ExportError: As :func:`verify_written_folder`.
    """
    kind = find_format(config.format)
    with tempfile.TemporaryDirectory(prefix="llmtune-") as name:
        folder = Path(name)
        copy_model_files(export_model.model_files, folder)
        update_config(folder, export_model.dtype, export_model.config_changes)
        dtype = kind.compared_dtype(config)
        # These are made of numbers that were never rounded to the base's dtype.
        source = export_model.source if dtype is None else RetypedSource(export_model.source, dtype)
        return _check(export_model, folder, source, config, kind.quantization(config))


def _check(
    export_model: ExportModel,
    folder: Path,
    source: TensorSource,
    config: ExportConfig,
    quantized: str | None = None,
) -> Parity | None:
    say = export_model.request.say
    for note in check_export(folder, source):
        say(f"note: {note}")
    dtype = usual_dtype(source)
    if not config.parity or not export_model.computed or dtype is None:
        return None
    tokens = probe_tokens(_tokenizer(folder), _rows(source), _trained_tokens(export_model))
    sides = ComparedModels(
        base_folder=export_model.request.base,
        base=export_model.base,
        adapter=export_model.adapter,
        merged_folder=folder,
        merged=source,
        base_changes=export_model.base_changes,
    )
    unfit = _find_unfit(export_model, folder) if is_renamed(folder) else None
    if unfit is not None:
        parity = compare_weights(sides, dtype)
        say(f"note: the logits of this architecture are not compared: {unfit}")
    elif is_renamed(folder):
        parity = measure_parity_in_memory(sides, tokens, dtype, config.parity_bound)
    else:
        parity = measure_parity(sides, tokens, dtype, config.parity_bound)
    parity = replace(parity, quantized=quantized)
    say(f"parity: {parity.describe()}")
    if parity.lost is not None:
        say(f"note: {parity.lost}")
    return parity


def _tokenizer(folder: Path) -> Any:
    """None where there is none."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


def _rows(source: TensorSource) -> int:
    """Rows of the first embedding, which every token must stay below."""
    found = [spec.shape[0] for name, spec in source.specs.items() if is_input_embedding(name)]
    if not found:
        raise ExportError(
            "parity: no embedding of tokens was found, so no text can be tried; export.parity=false"
            " leaves it out"
        )
    return found[0]


def _trained_tokens(export_model: ExportModel) -> list[int]:
    """Tokens whose rows the adapter brings: trained one by one, or added to the vocabulary."""
    if export_model.adapter is None:
        return []
    found = {
        row
        for module in export_model.adapter.modules
        for row in export_model.adapter.token_indices(module)
    }
    before, after = _rows(export_model.base), _rows(export_model.source)
    return sorted(found) + list(range(before, after))


def _find_unfit(export_model: ExportModel, folder: Path) -> str | None:
    """Why a model whose stored names transformers translates, and that is therefore loaded whole,
    cannot be; None if it can.
    """
    if not any(folder.glob("*.safetensors")):
        return "it can be loaded from safetensors only"
    base = (
        export_model.base.source
        if isinstance(export_model.base, FilteredSource)
        else export_model.base
    )
    if export_model.base_changes or (
        export_model.adapter is not None and not isinstance(base, SafetensorsSource)
    ):
        return "its base is not in a folder that can be loaded"
    count = sum(spec.nbytes // spec.dtype.itemsize for spec in export_model.source.specs.values())
    needed = _WHOLE_BYTES_PER_BYTE * count * torch.float32.itemsize
    free = psutil.virtual_memory().available
    if needed > free:
        return (
            f"they need the whole model in memory, {format_bytes(needed)} of {format_bytes(free)}"
            " that are free"
        )
    return None

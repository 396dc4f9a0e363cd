"""Verify an export before it is published: others can load it, and it computes what was trained."""

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
from llmtune.export.export_model import ExportModel
from llmtune.export.formats.format import find_format
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
from llmtune.export.verify.serving_checks import find_serving_problems
from llmtune.export.writers.model_files import copy_model_files, update_config
from llmtune.units import format_bytes, some

#: Memory for comparing in memory, in sizes of the model in fp32: two models, and activations.
_MEMORY_FACTOR = 3


def verify_written_folder(
    export_model: ExportModel, folder: Path, config: ExportConfig
) -> Parity | None:
    """Verify a model folder that was written and is not published yet.

    Returns:
        None where there was nothing to compare.

    Raises:
        ExportError: Serving programs would refuse it, or it is another model.
    """
    return _verify(export_model, folder, SafetensorsSource(folder), config)


def verify_merged_model(export_model: ExportModel, config: ExportConfig) -> Parity | None:
    """Verify the tensors of a model that will be written in a format transformers cannot read.

    Raises:
        ExportError: As :func:`verify_written_folder`.
    """
    kind = find_format(config.format)
    with tempfile.TemporaryDirectory(prefix="llmtune-") as name:
        folder = Path(name)
        copy_model_files(export_model.model_files, folder)
        update_config(folder, export_model.dtype, export_model.config_changes)
        dtype = kind.compared_dtype(config)
        # Such a file is made of fp32 numbers that were never rounded to the base's dtype.
        source = export_model.source if dtype is None else RetypedSource(export_model.source, dtype)
        return _verify(export_model, folder, source, config, kind.quantization(config))


def _verify(
    export_model: ExportModel,
    folder: Path,
    source: TensorSource,
    config: ExportConfig,
    quantized: str | None = None,
) -> Parity | None:
    say = export_model.request.say

    # Other programs must be able to load it.
    report = find_serving_problems(folder, source)
    if report.problems:
        raise ExportError(
            f"what was to be published cannot be served: {len(report.problems)} problems:"
            f" {some(report.problems, 6)}; nothing was published"
        )
    for note in report.notes:
        say(f"note: {note}")

    dtype = usual_dtype(source)
    if not config.parity or not export_model.computed or dtype is None:
        return None

    # It must be base and adapter. The logits are compared if both models can be run here.
    tokens = probe_tokens(_tokenizer(folder), _rows(source), _trained_tokens(export_model))
    models = ComparedModels(
        base_folder=export_model.request.base,
        base=export_model.base,
        adapter=export_model.adapter,
        merged_folder=folder,
        merged=source,
        base_changes=export_model.base_changes,
    )
    if not is_renamed(folder):
        parity = measure_parity(models, tokens, dtype, config.parity_bound)
    elif (obstacle := _find_obstacle(export_model, folder)) is None:
        parity = measure_parity_in_memory(models, tokens, dtype, config.parity_bound)
    else:
        parity = compare_weights(models, dtype)
        say(f"note: the logits of this architecture are not compared: {obstacle}")
    parity = replace(parity, quantized=quantized)
    say(f"parity: {parity.describe()}")
    if parity.loss_note is not None:
        say(f"note: {parity.loss_note}")
    return parity


def _tokenizer(folder: Path) -> Any:
    """Load the tokenizer; None where there is none."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


def _rows(source: TensorSource) -> int:
    """Return the number of rows of the first embedding, which all token ids are below."""
    rows = [spec.shape[0] for name, spec in source.specs.items() if is_input_embedding(name)]
    if not rows:
        raise ExportError(
            "parity: no embedding of tokens was found, so no text can be tried; export.parity=false"
            " leaves it out"
        )
    return rows[0]


def _trained_tokens(export_model: ExportModel) -> list[int]:
    """Return tokens whose rows the adapter trained one by one, or added to the vocabulary."""
    adapter = export_model.adapter
    if adapter is None:
        return []
    trained = {row for module in adapter.modules for row in adapter.token_indices(module)}
    before, after = _rows(export_model.base), _rows(export_model.source)
    return sorted(trained) + list(range(before, after))


def _find_obstacle(export_model: ExportModel, folder: Path) -> str | None:
    """Find out why base and merged model cannot be loaded into memory; None if they can.

    Models whose stored names transformers translates cannot be streamed.
    """
    if not any(folder.glob("*.safetensors")):
        return "it can be loaded from safetensors only"
    base = export_model.base
    if isinstance(base, FilteredSource):
        base = base.source
    if export_model.base_changes or (
        export_model.adapter is not None and not isinstance(base, SafetensorsSource)
    ):
        return "its base is not in a folder that can be loaded"
    count = sum(spec.nbytes // spec.dtype.itemsize for spec in export_model.source.specs.values())
    needed = _MEMORY_FACTOR * count * torch.float32.itemsize
    free = psutil.virtual_memory().available
    if needed > free:
        return (
            f"they need the whole model in memory, {format_bytes(needed)} of {format_bytes(free)}"
            " that are free"
        )
    return None

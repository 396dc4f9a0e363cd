"""Open and check the model that is exported, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmtune.config.groups.export import ExportConfig, ExportDtype, MergeOnto
from llmtune.config.groups.tuner import TunerConfig
from llmtune.config.schema import Precision
from llmtune.config.stored import load_config
from llmtune.errors import ConfigError, ExportError
from llmtune.export.architecture import find_architecture, read_config, task_of
from llmtune.export.card.license import check_licenses
from llmtune.export.export_model import ExportModel, find_dtype
from llmtune.export.merge.adapter import Adapter
from llmtune.export.merge.merged_source import MergedSource
from llmtune.export.merge.peft_adapter import read_adapter
from llmtune.export.merge.stacks import find_stack_deltas
from llmtune.export.merge.task_head import find_task_head
from llmtune.export.request import ExportRequest
from llmtune.export.sources.bitsandbytes_base import open_base
from llmtune.export.sources.deepspeed.checkpoint_parts import (
    has_adapter,
    open_base_part,
    open_model_part,
)
from llmtune.export.sources.deepspeed.zero_source import ZeroSource
from llmtune.export.sources.master_weights import MasterWeightsSource, find_master_weights
from llmtune.export.sources.nf4 import Nf4RoundTripSource, quantized_names
from llmtune.export.sources.tensor_source import (
    RenamedSource,
    RetypedSource,
    SafetensorsSource,
    TensorSource,
    are_equal,
    is_embedding,
    is_input_embedding,
    is_output_embedding,
)
from llmtune.export.writers.model_files import check_model_files
from llmtune.model.skeleton import build_skeleton
from llmtune.model.weights.names import match_names
from llmtune.storage import layout
from llmtune.storage.tensors.dtypes import configured_dtype
from llmtune.tuner.tuner import TUNERS


def open_export_model(request: ExportRequest, config: ExportConfig) -> ExportModel:
    """Open what is exported.

    Raises:
        ExportError: Something is missing, damaged, or does not belong together.
    """
    base = _open_base(request, config)
    source, model_files, changes = base, [request.base], {}
    adapter, merged = None, None
    base_changes: dict[str, Any] = {}

    # An adapter is merged while the base is read; its own head replaces the base's.
    if request.adapter is not None:
        adapter = read_adapter(request.adapter)
        _note_other_base(request, adapter)
        head = find_task_head(request.base, base, adapter)
        if head is not None:
            base, base_changes = head, head.config_changes
        # Only adapters on embeddings ask for it; building the model takes tens of megabytes.
        embeds = any(is_embedding(f"{module}.weight") for module in adapter.modules)
        output = _output_embedding(request.base, base_changes) if embeds else None
        stacks = {}
        if adapter.settings.get("target_parameters"):
            skeleton = build_skeleton(request.base, base_changes)
            stacks = find_stack_deltas(skeleton, base.specs, adapter)
        merged = MergedSource(base, adapter, output, stacks)
        source, changes = merged, base_changes | merged.config_changes
        model_files.append(request.adapter)

    # The dtype of the files; DeepSpeed's checkpoint has fp32 master weights.
    dtype = find_dtype(config.dtype)
    if request.zero is not None and dtype is None:
        dtype = _stored_dtype(request.base)
    if dtype is not None:
        source = RetypedSource(source, dtype)
    return ExportModel(
        request=request,
        base=base,
        source=source,
        model_files=model_files,
        config_changes=changes,
        adapter=adapter,
        merged=merged,
        base_changes=base_changes,
    )


def _note_other_base(request: ExportRequest, adapter: Adapter) -> None:
    """Tell the user of an adapter that names another base: its tensors fit any of such shapes."""
    named = str(adapter.settings.get("base_model_name_or_path") or "")
    known = {Path(request.base_name).name.lower(), request.base.resolve().name.lower()}
    # A run knows its base by itself, whatever its path was.
    if named and request.run is None and Path(named).name.lower() not in known:
        request.say(
            f"note: the adapter names {named} as its base, and is merged into {request.base_name}"
        )


def _open_base(request: ExportRequest, config: ExportConfig) -> TensorSource:
    """Open the trained model, or the base that the adapter is added to."""
    if request.zero is not None:
        zero = ZeroSource(request.zero)
        return open_base_part(zero) if has_adapter(zero) else open_model_part(zero)
    if request.adapter is None:
        if config.merge_onto is MergeOnto.nf4:
            raise ExportError(
                "export.merge_onto=nf4: there is no adapter to merge; the key is for QLoRA"
            )
        # Rounded to bf16, master weights are the stored ones; other dtypes gain digits from them.
        finer = config.dtype in (ExportDtype.fp32, ExportDtype.fp16)
        checkpoint = find_master_weights(request.base) if finer else None
        return (
            MasterWeightsSource(checkpoint) if checkpoint is not None else open_base(request.base)
        )
    base = open_base(request.base)
    if config.merge_onto is MergeOnto.nf4 and isinstance(base, SafetensorsSource):
        names = quantized_names(request.base, base)
        base = Nf4RoundTripSource(base, names, *_how_quantized(request))
    left_out = {*_tied_copies(request.base, base), *_other_heads(request.base, base)}
    if not left_out:
        return base
    return RenamedSource(base, {name: name for name in base.specs if name not in left_out})


def check_merge(request: ExportRequest, onto: MergeOnto) -> None:
    """Refuse to merge an adapter onto another base than the one that its training began for.

    Raises:
        ConfigError: With the base to take; or the training has no readable configuration.
    """
    training = _find_training(request)
    if training is None:
        return
    tuner, _ = training
    if problem := TUNERS.find(tuner.kind).find_merge_problem(tuner, onto):
        raise ConfigError(problem)


def _find_training(request: ExportRequest) -> tuple[TunerConfig, Precision] | None:
    """Find how an adapter was trained, by the configuration beside it or in its run.

    A checkpoint that was copied elsewhere has one of its own. None where there is none.
    """
    if request.run is None or request.adapter is None:
        return None
    folders = request.adapter, request.adapter.parent, request.run
    stored = next((path for one in folders if (path := one / layout.CONFIG).is_file()), None)
    if stored is None:
        return None
    config = load_config(stored)
    return config.tuner, config.precision


def _how_quantized(request: ExportRequest) -> tuple[bool, torch.dtype | None]:
    """Tell how a training made its 4-bit weights.

    Returns:
        Whether it quantized the scales too, and the dtype that it quantized from. Without a
        training True, and None for the stored dtype.

    Raises:
        ConfigError: The training has no readable configuration.
    """
    training = _find_training(request)
    if training is None:
        return True, None
    tuner, precision = training
    return tuner.bnb_4bit_use_double_quant, configured_dtype(precision.value)


def _other_heads(folder: Path, base: TensorSource) -> list[str]:
    """Find tensors that a classifier lacks: those of the head that its base had before.

    Training puts a new head beside the base's files, which stay whole.
    """
    task = task_of(find_architecture(folder))
    if task is None or not task.heads:
        return []
    return list(match_names(build_skeleton(folder), base.specs).unused)


def _output_embedding(folder: Path, changes: dict[str, Any]) -> str | None:
    """Return the name of the matrix that the logits are computed with."""
    if not (folder / "config.json").is_file():
        return "lm_head.weight"
    skeleton = build_skeleton(folder, changes)
    layer = skeleton.get_output_embeddings()
    return next(
        (f"{name}.weight" for name, module in skeleton.named_modules() if module is layer), None
    )


def _tied_copies(folder: Path, base: TensorSource) -> list[str]:
    """Find output embeddings that repeat the input; transformers keeps one matrix of the two."""
    if not read_config(folder).get("tie_word_embeddings"):
        return []
    inputs = list(filter(is_input_embedding, base.specs))
    outputs = list(filter(is_output_embedding, base.specs))
    return [name for name in outputs if any(are_equal(base, name, other) for other in inputs)]


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """Read the dtype that ``config.json`` names."""
    config = read_config(folder)
    name = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) else None


def check_places(request: ExportRequest) -> None:
    """Check that the output is no folder that it is made from, and none around one.

    Raises:
        ExportError: It would replace its own source.
    """
    sources = [
        folder.resolve()
        for folder in (request.base, request.adapter, request.zero)
        if folder is not None
    ]
    if any(
        source == request.output.resolve() or request.output.resolve() in source.parents
        for source in sources
    ):
        raise ExportError(
            f"output_dir={request.output} holds what is exported; take another output_dir="
        )


def check_links(request: ExportRequest) -> None:
    """Check that what is published is in the folders that were named, and not linked into them.

    Raises:
        ExportError: A link leads out of its folder.
    """
    beside: set[Path] = set()
    if request.zero is not None:
        # The settings of an adapter are beside the folder that DeepSpeed's ranks wrote.
        beside = {request.zero.parent, *filter(Path.is_dir, request.zero.iterdir())}
    for folder in filter(None, (request.base, request.adapter, request.zero, *sorted(beside))):
        check_model_files(folder)
        check_licenses(folder)

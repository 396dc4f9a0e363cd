"""Build a rank's model: with all weights, or under ZeRO 3 with its own slice of every weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtune.config.groups.model import ModelConfig
from llmtune.config.schema import Precision
from llmtune.errors import ConfigError, MissingPrerequisiteError
from llmtune.model.attention import answer_on_host, group_heads_only_for_flash
from llmtune.model.nf4.nf4_model import In4Bits, allocate, packed_weights, quantize_layers
from llmtune.model.weights.files import read_entries
from llmtune.model.weights.quantized import find_meaningless, quantization
from llmtune.model.weights.report import WeightReport
from llmtune.model.weights.zero3_loading import load_partitions, restore_buffers
from llmtune.plan.abilities import ONE_BY_ONE, find_recomputing, is_bidirectional
from llmtune.plan.memory.recomputed_layers import RecomputedLayers
from llmtune.process import no_collection
from llmtune.storage.tensors.dtypes import configured_dtype
from llmtune.task.task import find_task
from llmtune.tuner.blocks import find_blocks
from llmtune.varlen_attention import VARLEN, leave_out_masks, register_varlen


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsTo:
    """The destination of the weights when they are read."""

    device_map: Any = None
    """transformers' ``device_map``, for unpartitioned weights."""
    partitioned: Callable[[], AbstractContextManager[Any]] | None = None
    """DeepSpeed's ``zero.Init`` for ZeRO 3, where weights are read slice by slice."""
    rank: int = 0
    """The rank whose slices are read."""
    in_4_bits: In4Bits | None = None
    """Keeps linear layers in NF4."""


def build_model(
    folder: Path,
    config: ModelConfig,
    precision: Precision,
    attn_implementation: str,
    weights: WeightsTo = WeightsTo(),
) -> Any:
    """Build the model of ``config.task`` in the training dtype, for adapters and for DeepSpeed.

    Args:
        folder: Model folder with safetensors.
        weights: Where they go; by default unpartitioned to the host.

    Raises:
        ConfigError: Quantized weights were to be partitioned; their bytes are not elements of the
            model.
        MissingPrerequisiteError: ``model.attn_implementation`` needs a package that is missing.
    """
    register_varlen()
    try:
        if weights.in_4_bits is not None:
            model = _load_in_4_bits(
                folder, config, precision, attn_implementation, weights, weights.in_4_bits
            )
        elif weights.partitioned is None:
            model = _load_unpartitioned(folder, config, precision, attn_implementation, weights)
        else:
            model = _load_partitioned(folder, config, precision, attn_implementation, weights)
    except ImportError as error:
        reason = str(error).strip().splitlines()[0]
        raise MissingPrerequisiteError(
            f"model.attn_implementation={attn_implementation}: {reason}"
        ) from error
    model.config.use_cache = False
    answer_on_host(model)
    group_heads_only_for_flash()
    if attn_implementation == VARLEN:
        leave_out_masks(model)
    return model


def _load_unpartitioned(
    folder: Path,
    config: ModelConfig,
    precision: Precision,
    attn_implementation: str,
    weights: WeightsTo,
) -> Any:
    with no_collection():
        import transformers

    model_class = getattr(transformers, find_task(config.task).model_class)
    loaded: Any = model_class.from_pretrained(
        str(folder),
        dtype=configured_dtype(precision.value),
        device_map=weights.device_map,
        output_loading_info=True,
        attn_implementation=attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    model, info = loaded
    _refuse_random(model, info["missing_keys"], folder)
    return model


def _load_partitioned(
    folder: Path,
    config: ModelConfig,
    precision: Precision,
    attn_implementation: str,
    weights: WeightsTo,
) -> Any:
    """Build the model under DeepSpeed's ``zero.Init``, then read this rank's slices into it."""
    if quantization(folder) is not None:
        raise ConfigError(
            f"{folder} holds quantized weights, which ZeRO 3 cannot partition: take zero=2"
            " (or 0, 1)"
        )
    make = _find_maker(folder, config, attn_implementation)
    from transformers.initialization import no_init_weights

    assert weights.partitioned is not None

    # No value is initialized: the slices are read over the empty memory.
    dtype = configured_dtype(precision.value)
    with no_init_weights():
        with weights.partitioned():
            model = make(dtype)
            # Part of the initialization that no_init_weights leaves out.
            model.tie_weights()
        restore_buffers(model, make, dtype)
    load_partitions(model, folder, weights.rank)
    return model


def _load_in_4_bits(
    folder: Path,
    config: ModelConfig,
    precision: Precision,
    attn_implementation: str,
    weights: WeightsTo,
    settings: In4Bits,
) -> Any:
    """Build the model without memory, allocate what this rank keeps, and quantize while reading.

    The model in 16 bits is nowhere whole. With ``zero.Init`` the model in 4 bits is not either.
    """
    if quantization(folder) is not None:
        raise ConfigError(
            f"{folder} holds quantized weights: tuner=qlora quantizes a model in 16 bits; take"
            " tuner=lora with zero=2 (or 0, 1), or the model in 16 bits"
        )
    make = _find_maker(folder, config, attn_implementation)
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    dtype = configured_dtype(precision.value)
    with no_init_weights():
        with init_empty_weights(include_buffers=False):
            model = make(dtype)
        # Inside, accelerate would make a new parameter of the tied one.
        model.tie_weights()
        head = find_task(config.task).head_modules(model)
        with weights.partitioned() if weights.partitioned is not None else settings.device:
            layers = quantize_layers(model, head, settings, dtype)
            allocate(model, settings.device)
        restore_buffers(model, make, dtype)
    packed = packed_weights(model, layers, settings, dtype)
    load_partitions(model, folder, weights.rank, packed)
    return model


def _find_maker(
    folder: Path, config: ModelConfig, attn_implementation: str
) -> Callable[[torch.dtype], Any]:
    """Return a function that makes the model of a folder in a dtype, without its weights."""
    with no_collection():
        import transformers

    model_class = getattr(transformers, find_task(config.task).model_class)
    architecture = transformers.AutoConfig.from_pretrained(
        str(folder), trust_remote_code=config.trust_remote_code
    )

    def make(dtype: torch.dtype) -> Any:
        return model_class.from_config(
            architecture,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )

    return make


def _refuse_random(model: Any, missing: Iterable[str], folder: Path) -> None:
    """Refuse weights that the files lack, and packed values in place of weights.

    transformers would draw the former anew on every rank. Before a run both were checked already.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    drawn = tuple(sorted(parameters & set(missing)))
    meaningless: list[str] = []
    if quantization(folder) is None:
        stored = read_entries(folder)
        meaningless = find_meaningless(
            {name: name for name in parameters & stored.keys()}, stored, parameters
        )
    WeightReport(
        missing=drawn,
        reshaped=(),
        tied=(),
        untied=(),
        defaults=(),
        unused=(),
        meaningless=tuple(meaningless),
    ).refuse(str(folder), folder)


def recompute_layers(model: Any, layers: RecomputedLayers) -> None:
    """Switch recomputation on for the first layers that a gradient reaches.

    The last layers keep their activations, because theirs are the first that the backward pass
    frees: they are gone when a layer is computed again. Layers before everything that is trained
    keep nothing in any case.

    Call it after adapters were added. peft would make the first layer's input need a gradient, and
    so would transformers' ``enable_input_require_grads``; checkpoints that are not reentrant do
    without, and layers that are frozen as a whole then stay out of the backward pass.

    Args:
        model: A transformers model with or without adapters, also partitioned by ZeRO 3. Modules
            beside its stack of layers, such as an encoder of images, are recomputed too where any
            layer is.
    """
    if layers.count == 0:
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    blocks = find_blocks(base)
    if blocks is None or find_recomputing(base) != ONE_BY_ONE:
        return
    first = len(blocks.modules) - layers.total
    for index, block in enumerate(blocks.modules):
        block.gradient_checkpointing = first <= index < first + layers.count


def sees_padding(model: Any) -> bool:
    """Tell whether tokens attend to later ones, so that the model must be told where padding is."""
    return is_bidirectional(model)

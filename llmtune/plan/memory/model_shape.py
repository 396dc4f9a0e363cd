"""Derive a model's shape from its configuration, on the meta device, without any weights."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.config.groups.model import ModelConfig
from llmtune.config.groups.tuner import TunerConfig
from llmtune.errors import ConfigError
from llmtune.plan.abilities import attention_kernels, max_positions
from llmtune.plan.memory.architecture import build_meta_model, load_architecture
from llmtune.plan.memory.shapes import ModelShape, TensorShape
from llmtune.plan.memory.trace_cache import read_cached, write_cached
from llmtune.tuner.adapted_layers import (
    AdaptedLayers,
    matrix_sides,
    stacked_parameters,
)
from llmtune.tuner.lora_settings import check_patterns, lora_rank
from llmtune.tuner.tuner import TUNERS, Tuner

if TYPE_CHECKING:
    pass


def resolve_shape(
    config: ModelConfig, tuner: TunerConfig, cache_dir: Path | None = None
) -> ModelShape:
    """Count the parameters of the model and of what the tuner trains.

    Args:
        cache_dir: Where shapes are cached, so that a second start need not build the model.

    Raises:
        ConfigError: ``tuner.target_modules`` matches nothing, or the order of a pattern's keys
            matters.
    """
    identity = _identify(config)
    if identity is None:
        return _count(config, tuner)
    patterns = (tuner.rank_pattern, tuner.alpha_pattern)
    key = repr((identity, tuner.kind, tuner.lora_r, *patterns, tuner.target_modules))
    stored = read_cached(cache_dir, "shapes", key)
    if stored is not None:
        tensors = tuple(TensorShape(**values) for values in stored.pop("tensors"))
        return replace(ModelShape.from_dict(stored), tensors=tensors)
    shape = _count(config, tuner)
    values = asdict(shape)
    write_cached(cache_dir, "shapes", key, values)
    return shape


def _identify(config: ModelConfig) -> str | None:
    """Identify the architecture; None for own code, or a repository that may change."""
    if config.trust_remote_code:
        return None
    if config.config:
        return repr(sorted(dict(config.config).items()))
    file = Path(config.name_or_path).expanduser()
    try:
        if file.suffix == ".gguf":
            status = file.stat()
            return f"{file.resolve()} {status.st_size} {status.st_mtime_ns}"
        return (file / "config.json").read_text()
    except (OSError, UnicodeDecodeError):
        return None


def _count(config: ModelConfig, tuner: TunerConfig) -> ModelShape:
    architecture = load_architecture(config)
    meta_model, causal = build_meta_model(architecture, config.trust_remote_code)
    model: Any = meta_model
    adapted = TUNERS.find(tuner.kind).choose_layers(model, tuner)
    adapters = _adapter_sizes(adapted, tuner) if adapted else {}
    tensors = _tensors(model, adapters, TUNERS.find(tuner.kind))
    if not any(tensor.trained for tensor in tensors):
        raise ConfigError(
            f"tuner.kind={tuner.kind} trains no parameter of {config.name_or_path}, whose"
            f" parameters have names such as {tensors[-1].name}: correct the tuner's trains()"
        )
    text: Any = architecture.get_text_config()
    hidden = int(getattr(text, "hidden_size", 0) or getattr(text, "d_model", 0))
    layers = max(1, int(getattr(text, "num_hidden_layers", 1)))
    heads = int(getattr(text, "num_attention_heads", 0) or 1)
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and inputs is not None and head.weight is inputs.weight
    base = [tensor for tensor in tensors if not tensor.adapter]
    return ModelShape(
        parameters=sum(tensor.numel for tensor in base),
        trainable_parameters=sum(tensor.numel for tensor in tensors if tensor.trained),
        adapter_parameters=sum(tensor.numel for tensor in tensors if tensor.adapter),
        tied=tied,
        head_parameters=head.weight.numel() if head is not None else 0,
        matrix_parameters=_matrix_parameters(model, text),
        largest_tensor=max(tensor.numel for tensor in base),
        largest_adapter_tensor=max(
            (tensor.numel for tensor in tensors if tensor.adapter), default=0
        ),
        layer_parameters=_largest_layer(model, adapters),
        hidden_size=hidden,
        intermediate_size=_intermediate_size(text) or 4 * hidden,
        layers=layers,
        vocab_size=int(getattr(text, "vocab_size", 0)),
        attention_width=heads * int(getattr(text, "head_dim", None) or hidden // heads),
        causal=causal,
        kernels=attention_kernels(model),
        max_positions=max_positions(model, architecture),
        adapted=tuple(adapted.endings) if adapted else (),
        left_alone=tuple(adapted.left_alone_endings) if adapted else (),
        stacked_parameters=stacked_parameters(model),
        kind=str(architecture.model_type),
        tensors=tuple(tensors),
    )


def _intermediate_size(text: Any) -> int:
    """That of the widest layer, where they differ; 0 if none is named."""
    size = getattr(text, "intermediate_size", None) or 0
    return max(size) if isinstance(size, list | tuple) else int(size)


def _tensors(model: Any, adapters: dict[str, tuple[int, int]], tuner: Tuner) -> list[TensorShape]:
    """List the parameters in the order of peft's model.

    An adapted layer's own weight comes first, then ``lora_A``, then ``lora_B``.
    """
    from torch import nn

    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            linear -= {id(parameter) for parameter in module.parameters()}
    tensors: list[TensorShape] = []
    for name, parameter in model.named_parameters():
        quantized = tuner.is_quantized and id(parameter) in linear
        tensors.append(
            TensorShape(
                name=name,
                numel=parameter.numel(),
                trained=tuner.trains(name, parameter),
                vector=parameter.dim() <= 1,
                quantized=quantized,
            )
        )
        owner = name.removesuffix(".weight")
        if name.endswith(".weight") and owner in adapters:
            tensors += _matrices(owner, adapters[owner])
    # A tied head, whose weight has the name of the embedding.
    seen = {tensor.name.partition(".lora_")[0] for tensor in tensors if tensor.adapter}
    for owner in adapters.keys() - seen:
        tensors += _matrices(owner, adapters[owner])
    return tensors


def _matrices(owner: str, sizes: tuple[int, int]) -> list[TensorShape]:
    return [
        TensorShape(
            name=f"{owner}.lora_{matrix}.default.weight",
            numel=numel,
            trained=True,
            vector=False,
            adapter=True,
        )
        for matrix, numel in zip("AB", sizes, strict=True)
    ]


def _matrix_parameters(model: Any, text: Any) -> int:
    """Count the weights in a token's forward pass; of experts only the share that is used."""
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding = {id(p) for p in inputs.parameters()} if inputs is not None else set()
    experts = int(
        getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 0
    )
    share = 1.0
    if experts:
        share = int(getattr(text, "num_experts_per_tok", None) or experts) / experts
    total = 0.0
    if head is not None and id(head.weight) in embedding:
        total = float(head.weight.numel())
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in embedding:
            total += parameter.numel() * (share if ".experts." in name else 1.0)
    return round(total)


def _largest_layer(model: Any, adapters: dict[str, tuple[int, int]]) -> int:
    """Count the parameters of the largest block of the module list that holds most."""
    from torch import nn

    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    if not lists:
        return sum(parameter.numel() for parameter in model.parameters())
    name, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    sizes = []
    for index, block in enumerate(blocks):
        size = sum(parameter.numel() for parameter in block.parameters())
        for owner, matrices in adapters.items():
            if owner.startswith(f"{name}.{index}."):
                size += sum(matrices)
        sizes.append(size)
    return max(sizes)


def _adapter_sizes(adapted: AdaptedLayers, tuner: TunerConfig) -> dict[str, tuple[int, int]]:
    """Map each adapted layer to the elements of its LoRA matrices, ``r x in`` and ``out x r``."""
    check_patterns(tuner, adapted.layers)
    sides = {name: matrix_sides(layer) for name, layer in adapted.layers.items()}
    ranks = {name: lora_rank(tuner, name) for name in sides}
    return {
        name: (ranks[name] * inputs, ranks[name] * outputs)
        for name, (inputs, outputs) in sides.items()
    }

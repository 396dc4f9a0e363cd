"""Derive a model's shape from its configuration, on the meta device, without any weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llmtune.config.groups.model import ModelConfig
from llmtune.config.groups.tuner import TunerConfig
from llmtune.errors import ConfigError
from llmtune.plan.abilities import (
    attention_kernels,
    find_recomputing,
    is_bidirectional,
    max_positions,
)
from llmtune.plan.architecture.corrected_architecture import correct_architecture
from llmtune.plan.architecture.load import load_architecture
from llmtune.plan.architecture.meta_model import build_meta_model, set_outputs
from llmtune.plan.architecture.rope_scaling import (
    check_scaled,
    has_dynamic_positions,
    is_scalable,
)
from llmtune.plan.architecture.varlen_trial import takes_borders
from llmtune.plan.memory.shapes import ModelShape, TensorShape
from llmtune.plan.memory.tensor_shapes import (
    AdapterSizes,
    active_share,
    adapter_sizes,
    check_packed,
    count_start,
    head_parameters,
    is_tied,
    largest_layer,
    list_tensors,
    matrix_parameters,
    packed_sizes,
)
from llmtune.plan.memory.trace_cache import read_cached, write_cached
from llmtune.storage.plain_json import parse_json
from llmtune.task.task import find_task
from llmtune.tuner.blocks import count_frozen_layers
from llmtune.tuner.stacks.stacked_weights import Stack, find_stacks, name_in_layers
from llmtune.tuner.token_rows.settings import TokenTable
from llmtune.tuner.tuner import TUNERS, find_trained
from llmtune.varlen_attention import VARLEN


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
    known = _count_tokens(config) if tuner.new_tokens else None
    key = repr((identity, config.rope_scaling, config.task, tuner, known))
    stored = read_cached(cache_dir, "shapes", key)
    if stored is not None:
        tensors = tuple(
            # JSON has no tuples.
            TensorShape(**{**values, "shape": tuple(values["shape"])})
            for values in stored.pop("tensors")
        )
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
        return f"{(file / 'config.json').read_text()} {correct_architecture(file)}"
    except (OSError, UnicodeDecodeError):
        return None


def _count_tokens(config: ModelConfig) -> int | None:
    """Count the tokens of a local model's tokenizer; None for one that is not on this machine.

    Such a model is planned as if its tables had no rows to spare.
    """
    file = Path(config.name_or_path).expanduser() / "tokenizer.json"
    try:
        stored = parse_json(file.read_bytes())
        entries = stored["model"]["vocab"]
        # A list of pairs, where the tokenizer weighs its tokens.
        tokens = {one[0] for one in entries} if isinstance(entries, list) else set(entries)
        return len(tokens | {one["content"] for one in stored.get("added_tokens") or ()})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _load_architecture(config: ModelConfig, tuner: TunerConfig) -> tuple[Any, int]:
    """Load the architecture that is trained, with rows for ``tuner.new_tokens``.

    Returns:
        It, and the rows of its tables of tokens without them.
    """
    architecture = load_architecture(config)
    set_outputs(architecture, find_task(config.task).default_labels.names)
    text: Any = architecture.get_text_config()
    rows = int(getattr(text, "vocab_size", 0))
    if tuner.new_tokens:
        known = _count_tokens(config)
        text.vocab_size = max(rows, (rows if known is None else known) + len(tuner.new_tokens))
    return architecture, rows


def _count(config: ModelConfig, tuner: TunerConfig) -> ModelShape:
    task = find_task(config.task)
    architecture, vocabulary = _load_architecture(config, tuner)
    model: Any
    model, trainable = build_meta_model(architecture, config.trust_remote_code, task.model_class)
    check_scaled(model, config.rope_scaling, config.name_or_path)
    head = task.head_modules(model) if trainable else []
    kind = TUNERS.find(tuner.kind)
    adapted = kind.choose_layers(model, tuner, head)
    adapters = adapter_sizes(adapted, tuner) if adapted else {}
    trained = find_trained(kind, model, tuner, head)
    packed = packed_sizes(model, tuner, head)
    check_packed(packed, trained, tuner)
    stacks = adapted.stacks if adapted else {}
    tables = kind.find_token_tables(model, tuner)
    tensors = list_tensors(model, adapters, trained, packed, head, stacks, tables)
    _check_trained(tensors, tuner, config.name_or_path)

    # Sizes, under the names that architectures give them.
    text: Any = architecture.get_text_config()
    hidden = int(getattr(text, "hidden_size", 0) or getattr(text, "d_model", 0))
    base = [tensor for tensor in tensors if not tensor.adapter]
    layer_parameters, layer_quantized = largest_layer(model, adapters, tensors)
    return ModelShape(
        parameters=sum(tensor.numel for tensor in base),
        trainable_parameters=sum(tensor.numel for tensor in tensors if tensor.trained),
        adapter_parameters=sum(tensor.numel for tensor in tensors if tensor.adapter),
        tied=is_tied(model),
        head_parameters=head_parameters(model, head),
        matrix_parameters=matrix_parameters(model, text, head if task.judges_rows else ()),
        largest_tensor=max(tensor.numel for tensor in base),
        largest_adapter_tensor=max((one.numel for one in tensors if one.adapter), default=0),
        layer_parameters=layer_parameters,
        layer_quantized=layer_quantized,
        hidden_size=hidden,
        intermediate_size=_intermediate_size(text) or 4 * hidden,
        **_count_layers(model, trained, head, adapted is not None),
        vocab_size=vocabulary,
        **_count_heads(text, hidden),
        dynamic_positions=has_dynamic_positions(text),
        task=task.name,
        outputs=(architecture.num_labels or 0) if head else int(getattr(text, "vocab_size", 0)),
        judges_rows=bool(head) and task.judges_rows,
        bidirectional=is_bidirectional(model),
        attention_products=2 + len(_relative_products(text)),
        trainable=trainable,
        kernels=_find_kernels(model, architecture, config),
        max_positions=max_positions(model, architecture),
        scalable=is_scalable(text),
        adapted=tuple(adapted.all_endings) if adapted else (),
        left_alone=tuple(adapted.left_alone_endings) if adapted else (),
        loss_in_head=trainable and task.judges_words and _is_plain_head(model, adapters, tables),
        trains_head=_trains_head(model, trained),
        **_count_stacks(model, adapters, stacks),
        **count_start(adapters, tuner),
        kind=str(architecture.model_type),
        tensors=tuple(tensors),
    )


def _count_heads(text: Any, hidden: int) -> dict[str, Any]:
    """Count heads of attention, and the numbers of all of them."""
    heads = int(getattr(text, "num_attention_heads", 0) or 1)
    return {
        "heads": heads,
        "key_heads": int(getattr(text, "num_key_value_heads", None) or heads),
        "attention_width": heads * int(getattr(text, "head_dim", None) or hidden // heads),
    }


def _count_layers(
    model: Any, trained: Collection[str], head: Sequence[str], has_adapter: bool
) -> dict[str, Any]:
    """Count the layers, and those before everything that is trained."""
    layers = max(1, int(getattr(model.config.get_text_config(), "num_hidden_layers", 1)))
    frozen = 0 if has_adapter else min(layers, count_frozen_layers(model, trained, head))
    return {
        "layers": layers,
        "frozen_layers": frozen,
        "recomputing": find_recomputing(model),
    }


def _find_kernels(model: Any, architecture: Any, config: ModelConfig) -> tuple[str, ...]:
    """List the attention kernels of a model; code of its own is not run for it."""
    has_borders = find_task(config.task).judges_words and not config.trust_remote_code
    if has_borders and takes_borders(architecture):
        return (*attention_kernels(model), VARLEN)
    return attention_kernels(model)


def _count_stacks(
    model: Any, adapters: Mapping[str, AdapterSizes], stacks: Mapping[str, Stack]
) -> dict[str, Any]:
    """Count what a shape has of stacked experts, with adapters and without."""
    unreached = {name: one for name, one in find_stacks(model).items() if name not in stacks}
    adapted = sum(stack.numel for stack in stacks.values())
    return {
        "stacked_parameters": sum(parameter.numel() for parameter in unreached.values()),
        "unreached_stacks": tuple(name_in_layers(model, unreached)),
        "stack_adapter_parameters": sum(
            sizes.total for sizes in adapters.values() if sizes.is_of_stack
        ),
        "adapted_stacks": adapted,
        "adapted_per_token": round(adapted * active_share(model.config.get_text_config())),
    }


def _is_plain_head(
    model: Any, adapters: Mapping[str, AdapterSizes], tables: Sequence[TokenTable]
) -> bool:
    """Tell whether the loss can be computed in the output projection, which no tuner changes."""
    from llmtune.task.language_head.head_loss import plain_head
    from llmtune.task.language_head.logit_map import find_logit_map

    head = plain_head(model)
    # Code of a model may call its vocabulary by another name.
    if not getattr(model.config.get_text_config(), "vocab_size", 0):
        return False
    if head is None or any(table.is_output or table.tied is not None for table in tables):
        return False
    names = {name for name, module in model.named_modules() if module is head}
    return names.isdisjoint(adapters) and find_logit_map(model) is not None


def _trains_head(model: Any, trained: Collection[str]) -> bool:
    head = model.get_output_embeddings()
    if head is None:
        return False
    return any(one is head.weight for name, one in model.named_parameters() if name in trained)


def _check_trained(tensors: Sequence[TensorShape], tuner: TunerConfig, name: str) -> None:
    if not any(tensor.trained for tensor in tensors):
        raise ConfigError(
            f"tuner.kind={tuner.kind} trains no parameter of {name}, whose parameters have names"
            f" such as {tensors[-1].name}: correct the tuner's trains()"
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

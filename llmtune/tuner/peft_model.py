"""Attach, load and store LoRA adapters with peft."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llmtune.config.groups.tuner import TunerConfig
from llmtune.draws import Draw, torch_seed
from llmtune.errors import CheckpointError
from llmtune.process import no_collection
from llmtune.storage.layout import ADAPTER_WEIGHTS
from llmtune.tuner.adapted_layers import choose_layers, find_own_parameters
from llmtune.tuner.head import NO_HEAD, Head, in_modules
from llmtune.tuner.lora_settings import begins_from_base
from llmtune.tuner.stacks.stack_adapter import compute_in_place, find_stack_reads
from llmtune.tuner.start_factors import (
    Factors,
    adapted_layers,
    double_rank,
    get_start,
    split_stored,
)
from llmtune.tuner.stored_adapter import (
    ADAPTER_NAME as _NAME,
)
from llmtune.tuner.stored_adapter import (
    read_adapter_config,
    to_file_name,
    with_peft_defaults,
)
from llmtune.tuner.token_rows.layers import add_token_rows, find_tied_readers
from llmtune.tuner.token_rows.settings import TokenTable
from llmtune.tuner.token_rows.tables import find_token_tables
from llmtune.tuner.whole_parameters import Gather, Write, copy_whole, keep_whole, whole_shape


def add_lora(
    model: Any,
    config: TunerConfig,
    base: str,
    seed: int,
    head: Head = NO_HEAD,
    gather: Gather = keep_whole,
) -> Any:
    """Add LoRA adapters to a model, in the training dtype; DeepSpeed has their master weights.

    Args:
        base: The base model's name in ``adapter_config.json``.
        head: The task's head, which is trained in place.
        gather: Makes weights of the model whole while their values are looked at.
    """
    with _without_bitsandbytes():
        return _add_lora(model, config, base, seed, head, gather)


def import_peft() -> None:
    """Import peft as :func:`add_lora` does, ahead of it."""
    with _without_bitsandbytes(), no_collection():
        import peft  # noqa: F401


def _add_lora(
    model: Any, config: TunerConfig, base: str, seed: int, head: Head, gather: Gather
) -> Any:
    with no_collection():
        from peft import LoraConfig, get_peft_model

    chosen = choose_layers(model, config, head.modules)
    names = find_own_parameters(model, config, chosen)
    own = [parameter for name, parameter in model.named_parameters() if name in names]
    tables = find_token_tables(model, config)
    settings = LoraConfig(
        # Of a classifier peft would train a second copy of the head, which it makes of what this
        # rank has of it under ZeRO 3.
        task_type=None if head.modules else head.peft_type,
        r=config.lora_r,
        # peft annotates int, but only divides by it.
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        lora_dropout=config.lora_dropout,
        bias=config.bias,  # type: ignore[arg-type]
        init_lora_weights=_peft_start(config),  # type: ignore[arg-type]
        **chosen.peft_settings(config.target_modules, config.target_parameters),
        base_model_name_or_path=base,
    )
    torch.manual_seed(torch_seed(seed, Draw.adapter))
    with _gathering_for_dora(gather):
        # Without autocast_adapter_dtype=False peft makes fp32 adapters under ZeRO 3, silently.
        wrapped: Any = get_peft_model(model, settings, autocast_adapter_dtype=False)
    wrapped.peft_config[_NAME].base_model_name_or_path = base
    wrapped.peft_config[_NAME].inference_mode = True
    if chosen.stacks:
        compute_in_place(wrapped)
        # peft makes a set of them, which would be stored in any order.
        wrapped.peft_config[_NAME].target_parameters = settings.target_parameters
    # GPT-2's files hold (inputs, outputs), its layers in 4 bits do not, and peft reads the layers.
    # Who merges the adapter needs to know what the files hold.
    if any(getattr(module, "is_stored_transposed", False) for module in model.modules()):
        wrapped.peft_config[_NAME].fan_in_fan_out = True
    for parameter in own:
        parameter.requires_grad_(True)
    if config.modules_to_save:
        wrapped.peft_config[_NAME].modules_to_save = list(config.modules_to_save)
    if head.modules:
        _train_head(wrapped, head)
    if tables:
        add_token_rows(wrapped.get_base_model(), tables, gather)
        wrapped.peft_config[_NAME].trainable_token_indices = _as_peft_lists(tables)
    return wrapped


def _as_peft_lists(tables: Sequence[TokenTable]) -> list[int] | dict[str, list[int]]:
    """Return peft's ``trainable_token_indices``; a plain list is for the input embeddings."""
    if len(tables) == 1 and not tables[0].is_output:
        return list(tables[0].tokens)
    return {table.path: list(table.tokens) for table in tables}


def _peft_start(config: TunerConfig) -> bool | str:
    """Return peft's ``init_lora_weights``.

    What begins from the base's weights is computed by :mod:`llmtune.tuner.start_factors`, which
    does not need the whole model.
    """
    is_plain = config.init_lora_weights == "default" or begins_from_base(config)
    return True if is_plain else config.init_lora_weights


@contextmanager
def _gathering_for_dora(gather: Gather) -> Iterator[None]:
    """Let peft see whole weights when it takes the lengths of their rows.

    Its own function for that (``peft.utils.integrations.gather_params_ctx``) does it only where
    transformers' Trainer has set up ZeRO 3, and sends every weight from rank 0 to the others.
    """
    dora: Any = importlib.import_module("peft.tuners.lora.dora")
    own = dora.gather_params_ctx
    dora.gather_params_ctx = lambda parameters, **_: gather(list(parameters))
    try:
        yield
    finally:
        dora.gather_params_ctx = own


def find_read_elsewhere(wrapped: Any) -> Iterator[tuple[Any, Any]]:
    """Yield layers that read a parameter of another module in every forward pass, with that.

    DoRA's read their base layer's weight (``peft/tuners/lora/dora.py``), an adapter on a stack of
    experts all that it adds up, and an output projection the embeddings that it is tied to, where
    rows of them are trained.
    """
    from peft.tuners.lora.layer import LoraLayer

    yield from find_tied_readers(wrapped)
    yield from find_stack_reads(wrapped)
    for module in wrapped.modules():
        if isinstance(module, LoraLayer) and module.lora_magnitude_vector:
            base: Any = module.get_base_layer()
            yield from ((module, parameter) for parameter in base.parameters())


def _train_head(wrapped: Any, head: Head) -> None:
    """Train the head in place, and say in the adapter's settings that its file holds the head.

    The names in the file are those that peft gives to ``modules_to_save``.
    """
    for name, parameter in wrapped.get_base_model().named_parameters():
        if in_modules(name, head.modules):
            parameter.requires_grad_(True)
    stored = wrapped.peft_config[_NAME]
    saved = [*head.modules, *(stored.modules_to_save or ())]
    stored.task_type, stored.modules_to_save = head.peft_type, saved


@contextmanager
def _without_bitsandbytes() -> Iterator[None]:
    """Hide bitsandbytes from peft, which would import it and torch's compiler for over a second.

    Only layers of bitsandbytes need it, and a model that has some has imported it.
    """
    name: Any = "bitsandbytes"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        from peft import import_utils

        # peft caches the answer, which was right for this model only.
        import_utils.is_bnb_available.cache_clear()
        import_utils.is_bnb_4bit_available.cache_clear()


def load_adapter(
    model: Any, folder: Path, has_start: bool = False, write: Write = copy_whole
) -> dict[str, Factors]:
    """Copy an adapter file into the model's adapters.

    Args:
        has_start: The file has twice the rank, because it holds the adapter's start as well
            (:mod:`llmtune.tuner.start_factors`).
        write: Writes a whole tensor into a parameter of the model.

    Returns:
        The start by the layers' names; empty without one.

    Raises:
        CheckpointError: The file is missing, or its tensors are not those of the model's adapters.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    own = model.peft_config[_NAME]
    _check_settings(double_rank(own) if has_start else own, folder)
    file = folder / ADAPTER_WEIGHTS
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read as an adapter ({error})") from error
    parameters = {to_file_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    start: dict[str, Factors] = {}
    if has_start and stored.keys() == parameters.keys():
        ranks = {name: layer.r[_NAME] for name, layer in adapted_layers(model)}
        stored, start = split_stored(stored, ranks)
    different = sorted(stored.keys() ^ parameters.keys())
    different += [
        name
        for name in stored.keys() & parameters.keys()
        if tuple(stored[name].shape) != whole_shape(parameters[name])
    ]
    if different:
        raise CheckpointError(
            f"{file} is not an adapter of this model with tuner.lora_r and tuner.target_modules as"
            f" they are: {len(different)} tensors differ, such as {different[0]}"
        )
    with torch.no_grad():
        for name, tensor in stored.items():
            write(parameters[name], tensor)
    return start


def _check_settings(own: Any, folder: Path) -> None:
    """Refuse another scale or kind of adapter, under which equal matrices mean something else."""
    stored = with_peft_defaults(read_adapter_config(folder))
    different = [
        f"{key}: {stored[key]} there, {getattr(own, key)} here"
        for key in (
            "r",
            "lora_alpha",
            "rank_pattern",
            "alpha_pattern",
            "use_rslora",
            "use_dora",
            "bias",
        )
        if stored[key] != getattr(own, key)
    ]
    if stored.get("peft_type") != "LORA" or different:
        raise CheckpointError(
            f"{folder} is an adapter of another kind ({stored.get('peft_type')};"
            f" {'; '.join(different)})"
        )


def write_adapter_config(model: Any, folder: Path) -> None:
    """Write ``adapter_config.json`` as peft does."""
    settings = model.peft_config[_NAME]
    if get_start(model):
        settings = double_rank(settings)
    settings.save_pretrained(str(folder))

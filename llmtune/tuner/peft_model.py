"""Attach, load and store LoRA adapters with peft."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llmtune.config.groups.tuner import TunerConfig
from llmtune.draws import Draw, torch_seed
from llmtune.errors import CheckpointError
from llmtune.process import no_collection
from llmtune.storage.layout import ADAPTER_WEIGHTS
from llmtune.tuner.adapted_layers import choose_layers
from llmtune.tuner.head import NO_HEAD, Head, in_modules
from llmtune.tuner.stored_adapter import (
    read_adapter_config,
    with_peft_defaults,
)

#: peft's name for the only adapter, which its files leave out.
_INFIX = ".default."


def add_lora(model: Any, config: TunerConfig, base: str, seed: int, head: Head = NO_HEAD) -> Any:
    """Add LoRA adapters to a model, in the training dtype; DeepSpeed has their master weights.

    Args:
        base: The base model's name in ``adapter_config.json``.
        head: The task's head, which is trained in place.
    """
    with _without_bitsandbytes():
        return _add_lora(model, config, base, seed, head)


def import_peft() -> None:
    """Import peft as :func:`add_lora` does, ahead of it."""
    with _without_bitsandbytes(), no_collection():
        import peft  # noqa: F401


def _add_lora(model: Any, config: TunerConfig, base: str, seed: int, head: Head) -> Any:
    with no_collection():
        from peft import LoraConfig, get_peft_model

    chosen = choose_layers(model, config, head.modules).peft_settings(config.target_modules)
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
        lora_dropout=config.lora_dropout,
        **chosen,
        base_model_name_or_path=base,
    )
    torch.manual_seed(torch_seed(seed, Draw.adapter))
    # Without autocast_adapter_dtype=False peft makes fp32 adapters under ZeRO 3, silently.
    wrapped = get_peft_model(model, settings, autocast_adapter_dtype=False)
    wrapped.peft_config["default"].base_model_name_or_path = base
    wrapped.peft_config["default"].inference_mode = True
    if head.modules:
        _train_head(wrapped, head)
    return wrapped


def _train_head(wrapped: Any, head: Head) -> None:
    """Train the head in place, and say in the adapter's settings that its file holds the head.

    The names in the file are those that peft gives to ``modules_to_save``.
    """
    for name, parameter in wrapped.get_base_model().named_parameters():
        if in_modules(name, head.modules):
            parameter.requires_grad_(True)
    stored = wrapped.peft_config["default"]
    stored.task_type, stored.modules_to_save = head.peft_type, list(head.modules)


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


def to_file_name(parameter_name: str) -> str:
    """Return a parameter's name in adapter files."""
    return parameter_name.replace(_INFIX, ".")


def load_adapter(model: Any, folder: Path) -> None:
    """Copy an adapter file into the model's adapters.

    Raises:
        CheckpointError: The file is missing, or its tensors are not those of the model's adapters.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _check_settings(model, folder)
    file = folder / ADAPTER_WEIGHTS
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read as an adapter ({error})") from error
    parameters = {to_file_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    different = sorted(stored.keys() ^ parameters.keys())
    different += [
        name
        for name in stored.keys() & parameters.keys()
        if stored[name].shape != parameters[name].shape
    ]
    if different:
        raise CheckpointError(
            f"{file} is not an adapter of this model with tuner.lora_r and tuner.target_modules as"
            f" they are: {len(different)} tensors differ, such as {different[0]}"
        )
    with torch.no_grad():
        for name, tensor in stored.items():
            parameters[name].copy_(tensor)


def _check_settings(model: Any, folder: Path) -> None:
    """Refuse another scale or kind of adapter, under which equal matrices mean something else."""
    own = model.peft_config["default"]
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
    model.peft_config["default"].save_pretrained(str(folder))

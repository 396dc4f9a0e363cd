"""A transformers model without weights: its modules, its names, its shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch


def build_skeleton(folder: Path, changes: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """The model that ``config.json`` describes, with parameters that have shapes and no memory;
    buffers are real.

    Args:
        changes: Keys of ``config.json`` that are taken instead of its own.
    """
    import transformers
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    config = transformers.AutoConfig.from_pretrained(
        str(folder), trust_remote_code=False, **changes
    )
    config.use_cache = False
    named = (config.architectures or [""])[0]
    kind = getattr(transformers, named, None)
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = kind(config) if kind else transformers.AutoModelForCausalLM.from_config(config)
    # Inside, every assignment makes another parameter, and nothing is tied.
    model.tie_weights()
    hollow(model)
    return model


def hollow(model: Any) -> None:
    """One zero seen as a whole tensor: peft puts adapters where the base is, and with the meta
    device they would be nowhere.
    """
    # The old ones are kept until the end: an identity may be given again to what is made meanwhile.
    hollow: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                zero = torch.zeros(()).expand(parameter.shape)
                pair = hollow.setdefault(
                    id(parameter), (parameter, torch.nn.Parameter(zero, requires_grad=False))
                )
                module._parameters[key] = pair[1]


def is_hollow(parameter: torch.Tensor) -> bool:
    """Whether a parameter has a shape and no memory."""
    return parameter.untyped_storage().nbytes() == torch.float32.itemsize and not any(
        parameter.stride()
    )


def tied_aliases(model: Any) -> dict[str, list[str]]:
    """Parameter name -> other names of the same parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        name: [n for n in group if n != name]
        for group in names.values()
        for name in group
        if len(group) > 1
    }

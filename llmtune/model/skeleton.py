"""Build a transformers model without weights: its modules, names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch


def build_skeleton(folder: Path, changes: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Build the model of ``config.json`` with parameters that use no memory, and real buffers.

    Args:
        changes: Values that replace those of ``config.json``.
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
    # Within the context every assignment makes a new parameter, so that nothing is tied.
    model.tie_weights()
    hollow(model)
    return model


def hollow(model: Any) -> None:
    """Replace every parameter by a single zero, expanded to its shape.

    Meta tensors would not do, because peft puts adapters on the device of the base.
    """
    # The old parameters are kept until the end, because a freed one's identity may be used again.
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
    """Tell whether a parameter is one that :func:`hollow` made."""
    return parameter.untyped_storage().nbytes() == torch.float32.itemsize and not any(
        parameter.stride()
    )


def tied_aliases(model: Any) -> dict[str, list[str]]:
    """Map each name of a tied parameter to its other names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    aliases: dict[str, list[str]] = {}
    for group in names.values():
        if len(group) == 1:
            continue
        for name in group:
            aliases[name] = [other for other in group if other != name]
    return aliases

"""Find the blocks of a model: the list of its layers, and what follows them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from llmtune.tuner.head import in_modules


@dataclass(frozen=True, slots=True)
class Blocks:
    """The module list that holds most parameters."""

    name: str
    """Its path, such as ``model.layers``."""
    modules: Any
    """The ``ModuleList`` itself."""

    def path(self, index: int) -> str:
        """Return the path of a block."""
        return f"{self.name}.{index}"


def find_blocks(model: Any) -> Blocks | None:
    """Find the module list that holds most parameters; None for a model without one.

    Args:
        model: A transformers model, on any device, also partitioned by ZeRO 3.
    """
    from torch import nn

    lists = [
        Blocks(name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    return max(lists, key=lambda blocks: count_elements(blocks.modules), default=None)


def count_elements(module: Any) -> int:
    """Count the elements of a module's parameters, also those that ZeRO 3 has partitioned."""
    return sum(
        getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters()
    )


def find_following(model: Any, blocks: Blocks) -> list[str]:
    """Name the modules between the blocks and the head: the final norm, and BERT's pooler.

    The final norm is defined beside the list of blocks and right after it. OPT defines it before
    the list, and calls it ``final_layer_norm``.
    """
    owner, _, own = blocks.name.rpartition(".")
    siblings = {
        name: module
        for name, module in model.get_submodule(owner).named_children()
        if name == own or count_elements(module)
    }
    names = list(siblings)
    at = names.index(own)
    nearest = [*names[at + 1 : at + 2], *(name for name in names[:at] if name.startswith("final"))]
    prefix = f"{owner}." if owner else ""
    following = [f"{prefix}{name}" for name in nearest if _is_norm(siblings[name])][:1]
    base = model.base_model_prefix
    pooler = f"{base}.pooler" if hasattr(model, base) else "pooler"
    if any(name == pooler for name, _ in model.named_modules()):
        following.append(pooler)
    return following


def _is_norm(module: Any) -> bool:
    """Tell whether all parameters of a module are vectors."""
    return all(
        len(getattr(parameter, "ds_shape", parameter.shape)) == 1
        for parameter in module.parameters()
    )


def count_frozen_layers(model: Any, trained: Collection[str], head: Sequence[str] = ()) -> int:
    """Count the blocks before everything that is trained: no gradient flows back through them.

    Args:
        model: A transformers model, on any device.
        trained: Names of its trained parameters, as ``named_parameters`` gives them.
        head: Names of the modules that are the task's head.
    """
    blocks = find_blocks(model)
    if blocks is None:
        return 0
    output = model.get_output_embeddings()
    inputs = model.get_input_embeddings()
    behind = [*head, *find_following(model, blocks)]
    if output is not None and (inputs is None or output.weight is not inputs.weight):
        behind += [name for name, module in model.named_modules() if module is output]
    first = len(blocks.modules)
    for name in trained:
        if match := re.match(rf"{re.escape(blocks.name)}\.(\d+)\.", name):
            first = min(first, int(match[1]))
        elif not in_modules(name, behind):
            return 0
    return first

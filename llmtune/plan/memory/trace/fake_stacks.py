"""Stacked experts in a run on fake tensors.

Their product is computed in any dtype, and each of their adapters keeps a whole sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from llmtune.config.groups.tuner import TunerConfig
from llmtune.tuner.lora_settings import lora_rank
from llmtune.tuner.stacks.read_as import read_as
from llmtune.tuner.stacks.stacked_weights import find_stacks, is_target


@contextmanager
def any_dtype() -> Iterator[None]:
    """In the block, experts may be multiplied in any dtype.

    torch's grouped product computes fp32 and fp16 too, but on fake tensors it knows bf16 alone.
    transformers' own product keeps and makes the same tensors.
    """
    from transformers.integrations import moe

    chosen = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        moe._can_use_grouped_mm = chosen


def adapt_stacks(model: Any, tuner: TunerConfig, dtype: Any) -> None:
    """Let modules of stacked experts read ``W + left @ right``, as in training.

    Args:
        model: A model on the meta device, whose names may lack the prefix of a language model's.
    """
    import torch
    from torch import nn

    of_module: dict[Any, list[str]] = {}
    for name, stack in find_stacks(model).items():
        if not is_target(f"model.{name}", tuner.target_parameters):
            continue
        owner, _, key = name.rpartition(".")
        module, rank = model.get_submodule(owner), lora_rank(tuner, name)
        experts, rows, columns = stack.shape
        left = torch.empty(experts, rows, rank, dtype=dtype)
        right = torch.empty(experts, rank, columns, dtype=dtype)
        module.register_parameter(f"{key}_left", nn.Parameter(left))
        module.register_parameter(f"{key}_right", nn.Parameter(right))
        of_module.setdefault(module, []).append(key)
    for module, keys in of_module.items():
        module.forward = partial(_run, module, keys, module.forward)


def _run(module: Any, keys: list[str], forward: Any, *args: Any, **named: Any) -> Any:
    import torch

    with ExitStack() as block:
        for key in keys:
            left, right = getattr(module, f"{key}_left"), getattr(module, f"{key}_right")
            adapted = torch.baddbmm(getattr(module, key), left, right)
            block.enter_context(read_as(module, key, adapted))
        return forward(*args, **named)

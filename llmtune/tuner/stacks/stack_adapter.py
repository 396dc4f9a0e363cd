"""Compute with adapted stacks: experts read ``W + s * B @ A`` in place of ``W`` as they run.

peft registers a parametrization for the length of a forward pass, which moves the parameter into a
module of its own. DeepSpeed's ZeRO 3 has no hooks there, and never gathers it. Here the parameter
stays where it is, and the experts' kernels (``transformers/integrations/moe.py``) find the sum
under its name all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from llmtune.tuner.stacks.read_as import read_as
from llmtune.tuner.stored_adapter import ADAPTER_NAME


def compute_in_place(model: Any) -> None:
    """Let peft's adapters on stacks leave the parameters in their modules.

    Args:
        model: What peft made of a model.
    """
    for wrapper in _wrappers(model):
        wrapper._activate_lora = partial(_adapted, wrapper)


def find_stack_reads(model: Any) -> Iterator[tuple[Any, Any]]:
    """Yield peft's layers around stacks, each with a parameter that it reads of another module."""
    for wrapper in _wrappers(model):
        yield wrapper, wrapper.get_param()
        yield wrapper, wrapper.lora_A[ADAPTER_NAME].weight
        yield wrapper, wrapper.lora_B[ADAPTER_NAME].weight


def _wrappers(model: Any) -> Iterator[Any]:
    from peft.tuners.lora.layer import ParamWrapper

    yield from (module for module in model.modules() if isinstance(module, ParamWrapper))


@contextmanager
def _adapted(wrapper: Any, _: Any) -> Iterator[None]:
    """Put the sum in the place of a wrapper's parameter: peft's product, to the last bit.

    The factors have the shapes (experts, rows, r) and (experts, r, columns) of the stack.
    """
    left, right, scale = wrapper.get_delta_factors(ADAPTER_NAME)
    adapted = torch.baddbmm(wrapper.get_param(), left, right, alpha=scale)
    with read_as(wrapper.get_base_layer(), wrapper.parameter_name, adapted):
        yield

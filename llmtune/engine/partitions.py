"""Whole parameters under ZeRO 3: for a block, and in the forward pass of other modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any


def gather(parameters: Sequence[Any]) -> AbstractContextManager[Any]:
    """Make parameters whole on every rank for the length of a block.

    Parameters that are not partitioned stay as they are. Changes are lost. Collective.
    """
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(partitioned)
    return context


def gather_for_readers(read_elsewhere: Iterable[tuple[Any, Any]]) -> None:
    """Let ZeRO 3 gather parameters for other modules than their own, which read them.

    DeepSpeed finds such reads by itself only while the owner's forward pass runs
    (``ZeROOrderedDict`` of ``runtime/zero/parameter_offload.py``).

    Args:
        read_elsewhere: Modules, each with a parameter that it reads in its forward pass.
    """
    import deepspeed

    for module, parameter in read_elsewhere:
        if hasattr(parameter, "ds_id"):
            deepspeed.zero.register_external_parameter(module, parameter)

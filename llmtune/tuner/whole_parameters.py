"""Access to whole parameters of a model that may be partitioned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

Gather = Callable[[Sequence[Any]], AbstractContextManager[Any]]
"""Makes parameters whole for the length of a block, on all ranks together; no change is kept."""

Write = Callable[[Any, Any], None]
"""Writes a whole tensor into a parameter, of which a rank may hold a slice."""


def keep_whole(parameters: Sequence[Any]) -> AbstractContextManager[Any]:  # noqa: ARG001
    """Leave parameters as they are: they are whole."""
    return nullcontext()


def copy_whole(parameter: Any, values: Any) -> None:
    """Copy values into a parameter that is whole."""
    parameter.copy_(values)


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """Return the shape of a parameter, also where ZeRO 3 keeps a slice of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))

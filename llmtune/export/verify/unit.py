"""A module of a streamed model, with what an adapter put around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

#: Called with a unit, its inputs and its output, while the unit's weights are in memory.
UnitHook = Callable[["Unit", tuple[Any, ...], torch.Tensor], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Modules that are loaded together: a module with parameters, or peft's wrapper around one."""

    name: str
    outer: Any
    inner: list[tuple[str, Any]]
    """The base's modules in it, with their names in the unwrapped model."""

    by_rows: bool
    """True if only the inner modules' own ``forward`` uses their weights.

    It can then compute block by block.
    """

    @property
    def wrapped(self) -> bool:
        """Return whether an adapter is on it."""
        return len(self.inner) != 1 or self.inner[0][1] is not self.outer

"""The numbers that an update rule gets, and changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One step of some parameters, or of pieces of them; the lists are of equal lengths."""

    parameters: list[torch.Tensor]
    """fp32, changed in place."""
    gradients: list[torch.Tensor]
    """fp32, after clipping."""
    states: Mapping[str, list[torch.Tensor]]
    """The optimizer's states by name, changed in place; zero before the first step."""
    step: int
    """Counted from 1; skipped steps are not counted."""
    settings: Mapping[str, Any]
    """``lr``, and the keys that the optimizer reads; ``weight_decay`` is 0 for vectors."""

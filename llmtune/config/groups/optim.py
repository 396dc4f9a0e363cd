"""The keys of ``optim``: the optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """The optimizer and its settings."""

    kind: str = "adamw"
    """``adamw``, or ``lion`` (the sign of a momentum: one state per parameter instead of two)."""
    learning_rate: int | float | str = "auto"
    """Peak learning rate; ``auto`` follows tuner and model size."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; 1-D parameters have none."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of the two moments; for Lion of the momentum in a step, and from step to step."""
    eps: float = 1e-8
    """Added to the denominator."""
    param_groups: list[dict[str, Any]] = field(default_factory=list)
    """Other settings of some parameters: mappings with ``pattern``, and the settings themselves.

    They are ``learning_rate`` and ``weight_decay``. The first entry counts whose regular expression
    is found in a parameter's name, such as ``model.layers.0.mlp.up_proj.weight``.
    """

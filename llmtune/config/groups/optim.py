"""The keys of ``optim``: the optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Rounding(Enum):
    """The rounding of master weights and moments to bf16."""

    stochastic = "stochastic"
    """Up or down, with a probability that makes the mean right."""
    kahan = "kahan"
    """Weights to the nearest, with what was lost kept in one more bf16 number; moments as above."""
    nearest = "nearest"
    """Always to the nearest. An update below 1/512 of a number is lost; it is for comparison."""


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """The optimizer and its settings."""

    kind: str = "adamw"
    """The optimizer: one of ``adamw adamw_bf16 adamw_8bit adamw_paged_8bit adafactor lion muon``.

    ``adamw_bf16`` is AdamW with bf16 master weights and moments, ``adamw_8bit`` with bf16 master
    weights and moments in 8 bits, which ``adamw_paged_8bit`` leaves to the host where a GPU is
    full. ``lion`` takes the sign of a momentum: one state per parameter instead of two.
    ``adafactor`` keeps means of rows and columns of squared gradients, under ZeRO 0 alone. ``muon``
    makes a momentum orthogonal for matrices of layers, and is AdamW for all others.
    """
    learning_rate: int | float | str = "auto"
    """Peak learning rate; ``auto`` follows tuner and model size."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; 1-D parameters have none."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of the two moments; for Lion of the momentum in a step, and from step to step."""
    momentum: float = 0.95
    """Decay of the averaged gradient of ``muon``'s matrices."""
    eps: float = 1e-8
    """Added to the denominator."""
    rounding: Rounding = Rounding.stochastic
    """Rounding of an optimizer with bf16 master weights.

    ``stochastic``; ``kahan``, which takes 2 bytes more per trained parameter; or ``nearest``, which
    loses small updates.
    """
    param_groups: list[dict[str, Any]] = field(default_factory=list)
    """Other settings of some parameters: mappings with ``pattern``, and the settings themselves.

    They are ``learning_rate`` and ``weight_decay``. The first entry counts whose regular expression
    is found in a parameter's name, such as ``model.layers.0.mlp.up_proj.weight``.
    """

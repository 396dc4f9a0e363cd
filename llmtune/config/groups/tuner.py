"""The keys of ``tuner``: the weights that are trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass(slots=True, kw_only=True)
class FreezeConfig:
    """The part of the model that ``tuner=freeze`` trains: exactly one of both keys chooses it."""

    last_layers: int | None = None
    """The last layers, with the norm behind them."""
    pattern: str | None = None
    """Regular expression that is searched for in the names of parameters."""


@dataclass(slots=True, kw_only=True)
class TunerConfig:
    """The weights that are trained: all of the model, a part of it, or LoRA adapters."""

    kind: str = MISSING
    """``full``, ``freeze`` (a part of the model), ``lora``, or ``qlora``.

    ``qlora`` is LoRA on weights that are kept in 4 bits (NF4).
    """
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    adapter_path: str | None = None
    """A peft adapter folder to start from, whose ranks, scales and modules are taken."""
    lora_r: int = 16
    """Rank of the adapters."""
    lora_alpha: int | float = 32
    """Scale: the update is ``lora_alpha / lora_r * B @ A``."""
    rank_pattern: dict[str, Any] = field(default_factory=dict)
    """Name or regular expression of modules -> another rank, as in peft: ``{q_proj: 8}``."""
    alpha_pattern: dict[str, Any] = field(default_factory=dict)
    """The same for ``lora_alpha``."""
    use_rslora: bool = False
    """Divide ``lora_alpha`` by the square root of the rank (rsLoRA)."""
    lora_dropout: float = 0.0
    """Dropout on the adapters' input."""
    target_modules: Any = "all-linear"
    """``all-linear`` (all but the head), or a list of module name endings."""
    bnb_4bit_use_double_quant: bool = True
    """``qlora``: quantize the scales of the 4-bit weights too, which saves 0.4 bits per weight."""

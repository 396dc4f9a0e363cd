"""The keys of ``tuner``: the weights that are trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass(slots=True, kw_only=True)
class TunerConfig:
    """The weights that are trained: all of the model, or LoRA adapters."""

    kind: str = MISSING
    """``full``, ``lora``, or ``qlora`` (LoRA on weights in 4 bits; it can only be planned yet)."""
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

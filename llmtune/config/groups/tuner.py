"""``tuner``: what is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass(slots=True, kw_only=True)
class TunerConfig:
    """What is trained: everything, or LoRA adapters."""

    kind: str = MISSING
    """``full``, ``lora``, or ``qlora`` (LoRA on weights in 4 bits; it can be planned, not trained
    yet).
    """
    adapter_path: str | None = None
    """A peft adapter folder to go on from; its ranks, scales and modules are taken, and need not be
    set.
    """
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

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
    use_dora: bool = False
    """Train the lengths of the adapted weights' rows apart from their directions (DoRA)."""
    lora_plus_ratio: float | None = None
    """The learning rate of the matrices B over that of A (LoRA+); null gives both the same."""
    init_lora_weights: str = "default"
    """The first values of the adapters, by peft's names.

    ``default``, ``gaussian`` and ``orthogonal`` change nothing at the start. ``pissa``,
    ``pissa_niter_N`` (with N iterations in place of a full decomposition) and ``olora`` take the
    largest part of the base's weights out of the base, and train it. ``loftq`` (``tuner=qlora``)
    begins with what the quantization took from the base.
    """
    target_modules: Any = "all-linear"
    """The layers with adapters: ``all-linear`` (all but the head), a list of names or endings.

    A text with a sign such as ``*`` is a regular expression for whole names.
    """
    target_parameters: list[str] = field(default_factory=list)
    """Experts that are stacked in one parameter, by names or endings: ``mlp.experts.down_proj``.

    They get adapters beside the layers of ``target_modules``, which may then be ``[]``.
    """
    exclude_modules: Any = None
    """Layers that get no adapters although ``target_modules`` names them, in the same forms."""
    layers_to_transform: list[int] = field(default_factory=list)
    """Numbers of the model's layers in which adapters are put, from 0; empty for all."""
    modules_to_save: list[str] = field(default_factory=list)
    """Ends of the names of modules that are trained whole, and stored with the adapter."""
    trainable_token_indices: Any = None
    """Tokens whose rows of the input embeddings are trained, as in peft: numbers, or texts.

    A text is one that the tokenizer encodes as exactly one token: ``["<think>",128002]``.
    A tied output projection has the same rows. Of one with a weight of its own, rows are trained
    where a mapping names it: ``{embed_tokens: [5,6], lm_head: [5,6]}``.
    """
    new_tokens: list[str] = field(default_factory=list)
    """Tokens that are added to the tokenizer and to the model, and whose rows are trained.

    They begin with the mean of the other tokens' rows.
    """
    bias: str = "none"
    """Biases that are trained: ``none``, ``all``, or ``lora_only`` for those of adapted layers."""
    bnb_4bit_use_double_quant: bool = True
    """``qlora``: quantize the scales of the 4-bit weights too, which saves 0.4 bits per weight."""

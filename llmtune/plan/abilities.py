"""What an architecture can take: kernels of attention, lengths of rows, stages of ZeRO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmtune.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

#: Kernels of attention that transformers knows by a name -> the attribute of a model's class that
#: says whether it has them.
_KERNELS = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}

#: Kinds of rotary scaling whose ``factor`` multiplies the positions that the model was trained on.
_SCALING = ("linear", "dynamic", "yarn")


def attention_kernels(model: Any) -> tuple[str, ...]:
    """The kernels that a model (or its class) computes attention with; ``eager``, which all have,
    comes first.
    """
    return ("eager", *(kernel for kernel, flag in _KERNELS.items() if getattr(model, flag, False)))


def check_kernel(wanted: str, kernels: tuple[str, ...], name: str) -> None:
    """Refuse a kernel that the architecture lacks; names that are not transformers' own are left to
    it.

    Args:
        kernels: Those of the architecture.
        name: Of the model, for the message.

    Raises:
        ConfigError: transformers has not got it for this architecture.
    """
    if wanted in _KERNELS and wanted not in kernels:
        raise ConfigError(
            f"model.attn_implementation={wanted}: transformers has no such kernel for the"
            f" architecture of {name}, only {' and '.join(kernels)}; take"
            " model.attn_implementation=auto or eager"
        )


def max_positions(model: nn.Module, architecture: Any) -> int | None:
    """Tokens of the longest row that the model knows positions for; None where it knows no limit.

    Learned positions end with their table. Rotary ones can be computed for any row, and mean
    nothing to the model beyond those that it was trained on, which the configuration names; where a
    scaling multiplies them and the configuration does not say whether its number stands before or
    after it, the larger is taken. ALiBi and recurrent layers go on for ever.

    Args:
        model: On the meta device.
        architecture: Its transformers configuration.
    """
    from torch import nn

    text = architecture.get_text_config()
    known = named_positions(text)
    if (
        known is None
        or getattr(text, "alibi", False)
        or not getattr(text, "num_attention_heads", None)
    ):
        return None
    for name, module in model.named_modules():
        # RoBERTa's positions begin behind its padding token's, in the same table.
        if (
            isinstance(module, nn.Embedding)
            and "position" in name
            and module.padding_idx is not None
        ):
            known = min(known, module.num_embeddings - module.padding_idx - 1)
    return max([known, *_scaled_positions(text, known)])


def named_positions(text: Any) -> int | None:
    """The number of positions that a configuration names; None where it names none, or -1."""
    keys = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
    numbers = (getattr(text, key, None) for key in keys)
    return next((number for number in numbers if isinstance(number, int) and number > 0), None)


def _scaled_positions(text: Any, known: int) -> list[int]:
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]
    return [
        round(float(kind["factor"]) * (kind.get("original_max_position_embeddings") or known))
        for kind in kinds
        if kind.get("rope_type", kind.get("type")) in _SCALING and kind.get("factor")
    ]


def check_row_length(max_seq_length: int, positions: int | None, name: str) -> None:
    """Refuse rows that are longer than the model has positions.

    Raises:
        ConfigError: With the longest length that it takes.
    """
    if positions is not None and max_seq_length > positions:
        raise ConfigError(
            f"data.max_seq_length={max_seq_length}: {name} has {positions} positions, and what"
            f" stands behind them would be out of its range; take data.max_seq_length={positions}"
            " or less (data.overlong says what happens to longer rows), or a model whose"
            " config.json scales them (rope_scaling)"
        )


#: Architectures that use a layer's weight without calling the layer, where ZeRO 3 has only a slice
#: of it.
_NOT_PARTITIONED = ("gemma3n", "gemma3n_text")


def check_stage(stage: int, kind: str, name: str) -> None:
    """Refuse ZeRO 3 for architectures whose weights it cannot gather in time.

    Args:
        kind: Of the architecture (``model_type``).
        name: Of the model, for the message.

    Raises:
        ConfigError: It would fail in the first backward pass.
    """
    if stage == 3 and kind in _NOT_PARTITIONED:
        raise ConfigError(
            f"zero=3: {name} ({kind}) uses weights without calling the layers that own them, and"
            " DeepSpeed would not have gathered them; take zero=2"
        )

"""Shrink an architecture to few and narrow layers of the same kinds, for quick tests on a CPU."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

#: Layers that are kept. Most patterns of layers, such as one of full attention after five with a
#: window, repeat by then.
MAX_LAYERS = 16
VOCABULARY = 128
#: Shorter than the documents that are tried, so that windows take part.
WINDOW = 8

_HEADS = 4
_HEAD_SIZE = 16
_NARROW = 8
_INNER = 64
_EXPERTS = 4
_EXPERTS_PER_TOKEN = 2

#: Parts of the names of values that may equal the width by chance.
_NOT_WIDTHS = ("position", "seq", "length", "context", "vocab", "window", "chunk")

#: Name of a value in a configuration -> its upper limit.
_LIMITS = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "rotary_dim": _NARROW,
    **dict.fromkeys(
        (
            "ffn_dim",
            "ffn_hidden_size",
            "n_inner",
            "dff",
            "lru_width",
            "hidden_size_per_layer_input",
        ),
        _INNER,
    ),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "laurel_rank"), _NARROW),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "qk_head_dim"), _NARROW),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_k"), _EXPERTS_PER_TOKEN),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), _NARROW),
    **dict.fromkeys(("mamba_d_state", "state_size", "mamba_dt_rank", "time_step_rank"), _NARROW),
    **dict.fromkeys(
        ("sliding_window", "window_size", "local_attention", "attention_window_size"), WINDOW
    ),
    **dict.fromkeys(
        ("chunk_size", "mamba_chunk_size", "block_size", "attention_chunk_size"), 4 * WINDOW
    ),
}


def shrink(architecture: Any) -> Any:
    """Return a transformers configuration of the same kind with small sizes.

    Sizes that depend on each other in a way that is not known here may give a model that cannot be
    built or run; the caller must expect that.
    """
    small = deepcopy(architecture.get_text_config())
    layers = min(MAX_LAYERS, int(small.num_hidden_layers))
    _shorten_lists(small, int(small.num_hidden_layers), layers)
    small.num_hidden_layers = layers
    _narrow(small)
    for part in (small, getattr(small, "ffn_config", None), getattr(small, "attn_config", None)):
        for name, limit in _LIMITS.items():
            value = getattr(part, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > limit:
                setattr(part, name, limit)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(small, name, None) is not None:
            setattr(small, name, 0)
    return small


def _shorten_lists(small: Any, layers_before: int, layers: int) -> None:
    """Shorten lists with one entry per layer, and drop removed layers from lists of indices."""
    for name, value in list(vars(small).items()):
        if not isinstance(value, list | tuple) or not value:
            continue
        if len(value) == layers_before:
            setattr(small, name, type(value)(value[:layers]))
        elif name.endswith(("indices", "ids", "idxs", "layers")) and all(
            isinstance(index, int) for index in value
        ):
            # At least one of them stays, because it makes the architecture what it is.
            setattr(small, name, [index for index in value if index < layers] or [layers - 1])


def _narrow(small: Any) -> None:
    """Make the width, the heads and the state-space layers small.

    The order matters: the heads are read before they are changed, and all follow from their number.
    """
    heads = getattr(small, "num_attention_heads", None)
    kept_heads = min(_HEADS, int(heads)) if heads else _HEADS
    width = kept_heads * _HEAD_SIZE
    key_heads = _small_key_heads(small, heads, kept_heads)
    _narrow_width(small, width)
    if heads:
        small.num_attention_heads = kept_heads
    _narrow_heads(small, key_heads)
    if getattr(small, "mamba_n_heads", None) or getattr(small, "n_mamba_heads", None):
        _narrow_state_space(small, kept_heads, width)
    elif not heads and getattr(small, "num_heads", None):
        small.num_heads = int(getattr(small, "expand", 2)) * kept_heads


def _small_key_heads(small: Any, heads: int | None, kept_heads: int) -> int:
    """Return the key-value heads: as many as queries, one, or half, as in the large model."""
    key_heads = getattr(small, "num_key_value_heads", None) or getattr(small, "num_kv_heads", None)
    if key_heads == heads:
        return kept_heads
    return 1 if key_heads == 1 else max(1, kept_heads // 2)


def _narrow_width(small: Any, width: int) -> None:
    large_width = int(small.hidden_size)
    for name, value in list(vars(small).items()):
        is_inner = "intermediate_size" in name
        if isinstance(value, list) and is_inner:
            setattr(small, name, [_INNER] * len(value))
        if not isinstance(value, int) or isinstance(value, bool) or value <= 64:
            continue
        if is_inner:
            setattr(small, name, _INNER)
        elif value == large_width and not any(part in name for part in _NOT_WIDTHS):
            # Projections to and from the width, such as OPT's and RWKV's, keep it.
            setattr(small, name, width)
    for part in (small, getattr(small, "ffn_config", None)):
        _replace(part, ("hidden_size",), width)


def _narrow_heads(small: Any, key_heads: int) -> None:
    # DeepSeek's head_dim is that of the rotated part of a head.
    head_size = _NARROW if getattr(small, "qk_rope_head_dim", None) else _HEAD_SIZE
    for name in ("head_dim", "kv_channels"):
        # A property is computed from other values, and is not in vars().
        if isinstance(vars(small).get(name), int):
            setattr(small, name, head_size)
    names = ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads", "kv_n_heads")
    for part in (small, getattr(small, "attn_config", None)):
        _replace(part, names, key_heads)


def _narrow_state_space(small: Any, kept_heads: int, width: int) -> None:
    """Narrow a state-space layer, whose inner width is a whole number of heads."""
    expand = int(getattr(small, "mamba_expand", 2))
    _replace(small, ("mamba_n_heads", "n_mamba_heads"), expand * kept_heads)
    _replace(small, ("mamba_d_head", "mamba_headdim"), _HEAD_SIZE)
    _replace(small, ("mamba_d_ssm",), expand * width)


def _replace(part: Any, names: tuple[str, ...], value: int) -> None:
    """Set those of the attributes that exist and are not zero."""
    for name in names:
        if getattr(part, name, None):
            setattr(part, name, value)

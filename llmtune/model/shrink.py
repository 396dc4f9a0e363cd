"""A small model of an architecture: its layers as they are, only few and narrow, so that a CPU can
try them in no time.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

#: Layers that are kept: most patterns of layers, such as one of full attention after five with a
#: window, repeat by then.
MAX_LAYERS = 16
VOCABULARY = 128
#: Shorter than the documents that are tried, so that windows take part.
WINDOW = 8

_HEADS, _HEAD_SIZE, _NARROW = 4, 16, 8
_EXPERTS, _TAKEN = 4, 2

#: In names of numbers that may be as large as the width by chance.
_NOT_WIDTHS = ("position", "seq", "length", "context", "vocab", "window", "chunk")

#: Name of a number in a configuration -> what it becomes, where it is larger.
_NUMBERS = {
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
        64,
    ),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "laurel_rank"), _NARROW),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "qk_head_dim"), _NARROW),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_k"), _TAKEN),
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
    """A configuration of the same kind with small numbers; a transformers configuration.

    Numbers that depend on each other in a way that is not known here give a model that cannot be
    built or run: whoever builds it must expect that.
    """
    small = deepcopy(architecture.get_text_config())
    layers = min(MAX_LAYERS, int(small.num_hidden_layers))
    _shorten_lists(small, int(small.num_hidden_layers), layers)
    small.num_hidden_layers = layers
    _narrow(small)
    for part in (small, getattr(small, "ffn_config", None), getattr(small, "attn_config", None)):
        for name, most in _NUMBERS.items():
            value = getattr(part, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > most:
                setattr(part, name, most)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(small, name, None) is not None:
            setattr(small, name, 0)
    return small


def _shorten_lists(small: Any, before: int, layers: int) -> None:
    """Lists of one entry a layer, and lists of layers' numbers."""
    for name, value in list(vars(small).items()):
        if not isinstance(value, list | tuple) or not value:
            continue
        if len(value) == before:
            setattr(small, name, type(value)(value[:layers]))
        elif name.endswith(("indices", "ids", "idxs", "layers")) and all(
            isinstance(one, int) for one in value
        ):
            # At least one of them stays: it is what makes the architecture.
            setattr(small, name, [one for one in value if one < layers] or [layers - 1])


def _narrow(small: Any) -> None:
    heads = getattr(small, "num_attention_heads", None)
    kept = min(_HEADS, int(heads)) if heads else _HEADS
    _narrow_widths(small, kept * _HEAD_SIZE)
    _narrow_heads(small, heads, kept)
    _narrow_state_space(small, heads, kept)


def _narrow_widths(small: Any, width: int) -> None:
    before = int(small.hidden_size)
    for name, value in list(vars(small).items()):
        if isinstance(value, int) and not isinstance(value, bool) and value > 64:
            if "intermediate_size" in name:
                setattr(small, name, 64)
            elif value == before and not any(part in name for part in _NOT_WIDTHS):
                # Projections to and from the width, such as OPT's and RWKV's, keep it.
                setattr(small, name, width)
        elif isinstance(value, list) and "intermediate_size" in name:
            setattr(small, name, [64] * len(value))
    for part in (small, getattr(small, "ffn_config", None)):
        if getattr(part, "hidden_size", None):
            setattr(part, "hidden_size", width)  # noqa: B010


def _narrow_heads(small: Any, heads: int | None, kept: int) -> None:
    grouped = getattr(small, "num_key_value_heads", None) or getattr(small, "num_kv_heads", None)
    if heads:
        small.num_attention_heads = kept
    for name in ("head_dim", "kv_channels"):
        # What is computed from others is no number of its own.
        if isinstance(vars(small).get(name), int):
            # DeepSeek's is that of the rotated part of a head.
            rotated = getattr(small, "qk_rope_head_dim", None)
            setattr(small, name, _NARROW if rotated else _HEAD_SIZE)

    # As many groups as heads stay as many, one stays one, and others become half.
    groups = max(1, kept // 2)
    if grouped == heads:
        groups = kept
    elif grouped == 1:
        groups = 1
    for part in (small, getattr(small, "attn_config", None)):
        for name in (
            "num_key_value_heads",
            "num_kv_heads",
            "num_global_key_value_heads",
            "kv_n_heads",
        ):
            if getattr(part, name, None):
                setattr(part, name, groups)


def _narrow_state_space(small: Any, heads: int | None, kept: int) -> None:
    # The inner width of a state-space layer: as many heads as make it whole.
    if getattr(small, "mamba_n_heads", None) or getattr(small, "n_mamba_heads", None):
        expand = int(getattr(small, "mamba_expand", 2))
        for name in ("mamba_n_heads", "n_mamba_heads"):
            if getattr(small, name, None):
                setattr(small, name, expand * kept)
        for name in ("mamba_d_head", "mamba_headdim"):
            if getattr(small, name, None):
                setattr(small, name, _HEAD_SIZE)
        if getattr(small, "mamba_d_ssm", None):
            small.mamba_d_ssm = expand * kept * _HEAD_SIZE
    elif not heads and getattr(small, "num_heads", None):
        small.num_heads = int(getattr(small, "expand", 2)) * kept

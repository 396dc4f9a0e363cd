"""Attention over documents that lie one behind the other, without padding and without a mask.

The rows of a batch are one row of tokens then, and the borders of its documents come along, as
FlashAttention's functions in transformers get them (``cu_seq_lens_q``). On an NVIDIA GPU the kernel
is torch's own (``torch.nn.attention.varlen``, FlashAttention 2), which computes nothing between two
documents. Elsewhere SDPA attends within one document after the other.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

#: The name of this kernel in ``model.attn_implementation``.
VARLEN = "varlen"
#: The widest head of FlashAttention's kernels, and the number of which widths are a multiple.
LARGEST_HEAD, HEAD_STEP = 256, 8
#: What FlashAttention's kernel in torch lacks, by the names that transformers gives it.
_LACKING = ("softcap", "s_aux", "position_bias")
#: Up to this many tokens a document's products are written out on a CPU, where SDPA is slower.
SHORT_DOCUMENT = 256


class Exchange(Protocol):
    """Exchanges tokens for heads with other ranks: ``engine/head_exchange.py``."""

    def to_heads(self, *parts: torch.Tensor) -> list[torch.Tensor]:
        """Return some heads for all tokens, of all heads for some tokens."""

    def to_tokens(self, attended: torch.Tensor) -> torch.Tensor:
        """Return all heads for some tokens, of some heads for all tokens."""


#: With whom tokens are exchanged for heads, where ranks share the tokens of a batch.
_exchange: Exchange | None = None

#: Whether there are borders, for each running pass of a model that :func:`leave_out_masks` got.
_passes: list[bool] = []


def register_varlen() -> None:
    """Make the kernel known to transformers by its name.

    Where no borders come along (an answer is generated, rows are padded), it is SDPA with the mask
    that transformers makes for it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(VARLEN, attend)
    AttentionMaskInterface.register(VARLEN, _make_mask)


def leave_out_masks(model: Any) -> None:
    """Make no mask in those passes of a model with this kernel that have borders."""
    model.register_forward_pre_hook(_begin_pass, with_kwargs=True)
    model.register_forward_hook(_end_pass, always_call=True)


@contextmanager
def exchanging(exchange: Exchange | None) -> Iterator[None]:
    """In the block, batches with borders are parts, whose tokens are exchanged for heads."""
    global _exchange
    before, _exchange = _exchange, exchange
    try:
        yield
    finally:
        _exchange = before


def _begin_pass(_: Any, __: tuple[Any, ...], named: dict[str, Any]) -> None:
    _passes.append(named.get("cu_seq_lens_q") is not None)


def _end_pass(*_: Any) -> None:
    _passes.pop()


def _make_mask(*arguments: Any, **named: Any) -> torch.Tensor | None:
    from transformers.masking_utils import sdpa_mask

    return None if _passes and _passes[-1] else sdpa_mask(*arguments, **named)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor | None = None,
    **said: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each document, as transformers calls an attention function.

    Args:
        query: Shape (1, heads, tokens, width), as are ``key`` and ``value``, which may have fewer
            heads.
        cu_seq_lens_q: First token of each document, and the number of tokens, int32, shape
            (documents + 1,), of all ranks' tokens where these are exchanged. None for rows without
            borders.
        said: By transformers' names. ``scaling`` of the products; ``sliding_window``, the tokens
            that each token attends to, itself among them; ``max_length_q``, the tokens of the
            longest document.

    Returns:
        Shape (1, tokens, heads, width).

    Raises:
        ValueError: The model asks for what the kernel lacks.
    """
    lacking = [name for name in _LACKING if said.get(name) is not None]
    if said.get("dropout"):
        lacking.append("dropout")
    if lacking:
        raise ValueError(f"the kernel {VARLEN} has no {lacking[0]}")
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **said)
    scaling, window = said.get("scaling"), said.get("sliding_window")
    if _exchange is not None:
        # Rotary positions in fp32 may have left queries and keys in it.
        query, key = query.to(value.dtype), key.to(value.dtype)
        query, key, value = _exchange.to_heads(query, key, value)
    if query.device.type == "cuda":
        longest = said["max_length_q"]
        joined = _attend_on_gpu(query, key, value, cu_seq_lens_q, longest, scaling, window)
    else:
        joined = attend_one_by_one(query, key, value, cu_seq_lens_q, scaling, window)
    return joined if _exchange is None else _exchange.to_tokens(joined), None


def _attend_on_gpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn
    from torch.nn.functional import pad

    # Zeros behind a head change no product.
    width, own = max(query.shape[-1], value.shape[-1]), value.shape[-1]
    width += -width % HEAD_STEP
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Rotary positions in fp32 may have left queries and keys in it.
    queries, keys, values = (
        pad(part[0].transpose(0, 1), (0, width - part.shape[-1])).to(value.dtype)
        for part in (query, key, value)
    )
    attended = varlen_attn(
        queries,
        keys,
        values,
        borders,
        borders,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert not isinstance(attended, tuple)
    return attended[None, ..., :own]


def attend_one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    import torch

    lengths = borders.diff().tolist()
    of_documents = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    attended = []
    for queries, keys, values in of_documents:
        length = queries.shape[2]
        mask = None
        if length <= SHORT_DOCUMENT or (window is not None and length > window):
            mask = query.new_ones((length, length), dtype=torch.bool).tril()
            mask = mask if window is None else mask.triu(1 - window)
        attended.append(_attend_in_one(queries, keys, values, mask, scaling).transpose(1, 2))
    return torch.cat(attended, dim=1)


def _attend_in_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """Attend within one document; without a mask to all earlier tokens."""
    from torch.nn.functional import scaled_dot_product_attention

    rows, heads, length, width = query.shape
    if length > SHORT_DOCUMENT:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=heads != key.shape[1],
        )
    # All heads that share a key are one product with it, so that no key is repeated.
    assert mask is not None
    scale = width**-0.5 if scaling is None else scaling
    grouped = query.reshape(rows, key.shape[1], -1, width)
    scores = (grouped @ key.transpose(2, 3) * scale).view(rows, heads, length, length)
    weights = scores.masked_fill(~mask, float("-inf")).float().softmax(-1).to(value.dtype)
    return (weights.view(rows, key.shape[1], -1, length) @ value).view(rows, heads, length, -1)

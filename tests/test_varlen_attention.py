"""Attention within documents that lie one behind the other: against attention with a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from llmtune import varlen_attention
from llmtune.plan.architecture.varlen_trial import takes_borders
from llmtune.varlen_attention import _attend_on_gpu, attend

#: Queries, keys and values, the lengths of documents, and what an architecture says.
Drawn = tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], list[int], dict[str, Any]]


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: torch.Tensor,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """One softmax over all tokens of a row, in fp64. Shape (1, tokens, heads, width)."""
    query, key, value = query.double(), key.double(), value.double()
    tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    at = torch.arange(tokens)
    document = torch.searchsorted(borders.long(), at, right=True)
    seen = (document[:, None] == document) & (at[:, None] >= at)
    if window is not None:
        seen &= at[:, None] - at < window
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


@st.composite
def drawn_attention(draw: Any) -> Drawn:
    """Queries, keys and values, the lengths of documents, and what an architecture says."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    width, value_width = draw(st.sampled_from([(4, 4), (8, 8), (12, 12), (12, 8)]))
    torch.manual_seed(draw(st.integers(0, 99)))
    tokens = sum(lengths)
    parts = (
        torch.randn(1, kv_heads * groups, tokens, width),
        torch.randn(1, kv_heads, tokens, width),
        torch.randn(1, kv_heads, tokens, value_width),
    )
    given = {
        "scaling": draw(st.sampled_from([None, 0.3, 1.0])),
        "window": draw(st.sampled_from([None, 1, 3, 50])),
    }
    return parts, lengths, given


def borders_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@settings(max_examples=150, deadline=None)
@given(drawn_attention(), st.sampled_from([0, 5, 256]))
def test_documents_see_themselves_alone(drawn: Drawn, short: int) -> None:
    """With the products written out, and by SDPA: in results and in gradients."""
    parts, lengths, said = drawn
    borders = borders_of(lengths)
    for part in parts:
        part.requires_grad_()
    before, varlen_attention.SHORT_DOCUMENT = varlen_attention.SHORT_DOCUMENT, short
    try:
        found, _ = attend(
            torch.nn.Module(),
            *parts,
            None,
            scaling=said["scaling"],
            sliding_window=said["window"],
            cu_seq_lens_q=borders,
            max_length_q=max(lengths),
        )
    finally:
        varlen_attention.SHORT_DOCUMENT = before
    expected = masked_attention(*parts, borders, said["scaling"], said["window"])
    assert found.shape == expected.shape
    assert torch.allclose(found.double(), expected, atol=1e-5)
    weights = torch.randn_like(found)
    own = torch.autograd.grad((found * weights).sum(), parts)
    others = torch.autograd.grad((expected * weights).sum(), parts)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(own, others, strict=True))


@settings(max_examples=60, deadline=None)
@given(drawn_attention())
def test_the_kernel_of_a_gpu_is_asked_for_the_same(
    drawn: Drawn,
) -> None:
    """``varlen_attn`` as torch documents it: heads of one width, a multiple of eight."""
    parts, lengths, said = drawn

    def kernel(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        borders: torch.Tensor,
        borders_of_keys: torch.Tensor,
        longest: int,
        longest_key: int,
        *,
        scale: float,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> torch.Tensor:
        assert borders is borders_of_keys
        assert borders.dtype == torch.int32
        assert longest == longest_key == max(lengths)
        assert query.shape[-1] == key.shape[-1] == value.shape[-1]
        assert query.shape[-1] % 8 == 0
        assert enable_gqa or query.shape[1] == key.shape[1]
        left, right = window_size
        assert right == 0
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
        window = None if left == -1 else left + 1
        return masked_attention(query, key, value, borders, scale, window)[0].to(value.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
        borders = borders_of(lengths)
        found = _attend_on_gpu(*parts, borders, max(lengths), said["scaling"], said["window"])
    expected = masked_attention(*parts, borders, said["scaling"], said["window"])
    assert torch.allclose(found.double(), expected, atol=1e-5)


@pytest.mark.parametrize(
    "asked", [{"dropout": 0.1}, {"softcap": 30.0}, {"s_aux": torch.zeros(2)}], ids=str
)
def test_what_the_kernel_lacks_is_refused(asked: dict[str, Any]) -> None:
    part = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match=f"varlen has no {next(iter(asked))}"):
        attend(torch.nn.Module(), part, part, part, None, cu_seq_lens_q=borders_of([3]), **asked)


SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 97}
HEADS = {**SIZE, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("kind", "numbers", "takes"),
    [
        ("llama", HEADS, True),
        ("qwen3", {**HEADS, "head_dim": 8}, True),
        ("gemma3_text", {**HEADS, "head_dim": 8}, True),
        ("mistral", {**HEADS, "sliding_window": 8}, True),
        ("qwen3_moe", HEADS, True),
        ("phi3", {**HEADS, "pad_token_id": 0}, True),
        # Its widest head is beyond FlashAttention's.
        ("llama", {**HEADS, "head_dim": 512}, False),
        # Dropout of attention, soft caps and sinks are not in the kernel.
        ("llama", {**HEADS, "attention_dropout": 0.1}, False),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97}, False),
        ("gemma2", {**HEADS, "head_dim": 8}, False),
        ("gpt_oss", {**HEADS, "head_dim": 8, "num_local_experts": 4}, False),
        # Positions that are added to the products, or come from a mask, know no borders.
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97}, False),
        # It takes its class of attention from a list in which the kernel is not.
        (
            "gptj",
            {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97, "rotary_dim": 4},
            False,
        ),
        # Layers that are recurrent or convolve over the border.
        ("lfm2", HEADS, False),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97}, False),
    ],
)
def test_an_architecture_is_tried(kind: str, numbers: dict[str, Any], takes: bool) -> None:
    assert takes_borders(AutoConfig.for_model(kind, **numbers)) == takes

"""Padding on the right needs no mask, and masks are made without a look at what lies on the GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM

from llmtune.data.load.collate import Collator
from llmtune.data.store.token_store import Row
from llmtune.model.attention import answer_on_host, group_heads_only_for_flash
from llmtune.model.build import sees_padding
from llmtune.task.losses import sum_cross_entropy

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "mistral": {**GATED, "sliding_window": 5},
    "qwen2": {**GATED, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {**GATED, "head_dim": 8},
    "qwen3_moe": {
        **GATED,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gemma2": {**GATED, "head_dim": 8, "sliding_window": 5},
    "gemma3_text": {**GATED, "head_dim": 8, "sliding_window": 5},
    "mixtral": {**GATED, "num_local_experts": 4},
    "phi3": GATED,
    "olmo2": GATED,
    "gpt2": {**SIZES, "n_positions": 64},
    "gpt_neox": {**SIZES, "intermediate_size": 48},
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "bloom": SIZES,
    "falcon": {**SIZES, "alibi": True, "new_decoder_architecture": False},
    "mamba": {**SIZES, "state_size": 4},
}

#: Whose memory-efficient attention takes grouped heads.
SINCE_2_14 = Version(torch.__version__) >= Version("2.14")


def make_model(family: str, attention: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def make_rows(lengths: list[int]) -> list[Row]:
    made = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 97, (length,), generator=made).numpy() for length in lengths]
    return [Row(ids=row, mask=np.ones(len(row), bool), documents=(len(row),)) for row in ids]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_before_padding_are_the_same_without_a_mask(family: str, attention: str) -> None:
    if family in ("bloom", "gemma2", "mamba") and attention == "sdpa":
        pytest.skip("has no SDPA")
    model = make_model(family, attention)
    assert not sees_padding(model)
    rows = make_rows([12, 7, 3])
    with torch.no_grad():
        with_mask = model(
            **Collator(pad_token_id=0, masked=True).pad(rows).inputs, use_cache=False
        ).logits
        without = model(**Collator(pad_token_id=0).pad(rows).inputs, use_cache=False).logits
        answer_on_host(model)
        on_host = model(**Collator(pad_token_id=0).pad(rows).inputs, use_cache=False).logits
    for number, row in enumerate(rows):
        real = slice(0, len(row.ids))
        torch.testing.assert_close(
            without[number, real], with_mask[number, real], rtol=0, atol=2e-6
        )
    assert torch.isfinite(without).all(), (
        "padding may be anything but no number, which would spoil its gradients"
    )
    assert torch.equal(without, on_host)


@pytest.mark.parametrize("given", [False, True])
def test_flash_attention_asks_for_borders_only_where_there_may_be_some(given: bool) -> None:
    """In each layer, of positions on the GPU; ``meta`` has no answer for the host."""
    from transformers import modeling_flash_attention_utils as flash

    model = make_model("llama", "eager")
    answer_on_host(model)
    answers: list[bool] = []
    positions = torch.arange(6).view(1, 6)
    there = positions.to("meta")
    model.model.layers[1].register_forward_pre_hook(
        lambda *_: answers.append(bool(flash._is_packed_sequence(there, 1)))
    )
    inputs = {"input_ids": positions, **({"position_ids": positions} if given else {})}
    with torch.no_grad():
        if given:
            with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                model(**inputs, use_cache=False)
        else:
            model(**inputs, use_cache=False)
    assert answers == ([] if given else [False])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen3_moe"])
def test_documents_of_a_packed_row_are_still_told_apart(family: str) -> None:
    model = make_model(family, "eager" if family == "gemma2" else "sdpa")
    (one, other) = make_rows([6, 9])
    together = Row(
        ids=torch.cat([torch.as_tensor(one.ids), torch.as_tensor(other.ids)]).numpy(),
        mask=np.ones(15, bool),
        documents=(6, 9),
    )
    answer_on_host(model)
    with torch.no_grad():
        packed = model(**Collator(pad_token_id=0).pack([together]).inputs, use_cache=False).logits[
            0
        ]
        alone = [
            model(**Collator(pad_token_id=0).pad([row]).inputs, use_cache=False).logits[0]
            for row in (one, other)
        ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=2e-6)


def test_models_that_look_ahead_are_told_where_padding_is() -> None:
    plain = {**SIZES, "intermediate_size": 48}
    for family, about, looks_ahead in (
        ("llama", {**GATED, "is_causal": False}, True),
        ("gemma3_text", {**FAMILIES["gemma3_text"], "use_bidirectional_attention": True}, True),
        ("bert", plain, True),
        ("bert", {**plain, "is_decoder": True}, False),
        ("roberta", plain, True),
        ("electra", plain, True),
        ("electra", {**plain, "is_decoder": True}, False),
    ):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **about))
        assert sees_padding(model) is looks_ahead, (family, about)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "sdpa, heads repeated"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_without_a_mask_is_the_same_to_the_last_bit(
    family: str, attention: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and logits of real tokens in any case; the gradient of every weight where grouped heads
    are added up alike.

    transformers groups heads in SDPA only where there is no mask: their gradients are then added up
    in the kernel, and behind it else. Nothing else differs, as with heads that are repeated in
    both.
    """
    if family in ("bloom", "gemma2", "mamba") and attention != "eager":
        pytest.skip("has no SDPA")
    if attention == "sdpa, heads repeated":
        monkeypatch.setattr(
            "transformers.integrations.sdpa_attention.use_gqa_in_sdpa", lambda *_: False
        )
    rows = make_rows([40, 7, 3, 25])
    found: list[dict[str, torch.Tensor]] = []
    for masked in (True, False):
        model = make_model(family, attention.partition(",")[0]).to(dtype)
        answer_on_host(model)
        batch = Collator(pad_token_id=0, masked=masked).pad(rows)
        logits = model(**batch.inputs, use_cache=False).logits
        loss = sum_cross_entropy(logits, batch.targets)
        loss.backward()
        real = torch.cat([logits[number, : len(row.ids)] for number, row in enumerate(rows)])
        gradients = {
            name: weight.grad
            for name, weight in model.named_parameters()
            if weight.grad is not None
        }
        found.append({"loss": loss, "logits": real, **gradients})
    with_mask, without = found
    assert with_mask.keys() == without.keys()
    different = {name for name, value in without.items() if not torch.equal(value, with_mask[name])}
    if attention != "sdpa" or "num_key_value_heads" not in FAMILIES[family]:
        # Padding is sent to experts too, to others without a mask, and its zeros stand elsewhere in
        # their sums.
        assert [name for name in different if ".experts." not in name] == []
    assert not different & {"loss", "logits"}
    close = 1e-5 if dtype is torch.float32 else 2e-2
    for name in different:
        assert (without[name] - with_mask[name]).norm() <= close * with_mask[name].norm(), name


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "grouped"),
    [
        ("cuda", torch.bfloat16, 8, True),
        ("cuda", torch.float16, 9, True),
        ("cuda", torch.float16, 7, False),
        ("cuda", torch.float32, 9, False),
        ("cpu", torch.float32, 0, True),
    ],
)
def test_heads_are_grouped_where_flash_attention_takes_them(
    device: str, dtype: torch.dtype, capability: int, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import sdpa_attention

    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (capability, 0))
    group_heads_only_for_flash()
    group_heads_only_for_flash()
    key: Any = SimpleNamespace(device=torch.device(device), dtype=dtype)
    assert sdpa_attention.use_gqa_in_sdpa(None, key, key) is (grouped or SINCE_2_14)


def test_kernels_for_grouped_heads_are_those_that_torch_names() -> None:
    """Where this fails, look at ``group_heads_only_for_flash``."""
    said = " ".join(str(torch.nn.functional.scaled_dot_product_attention.__doc__).split())
    before = "It currently works only for Flash_attention and math kernel on CUDA tensor"
    since = "Memory-efficient attention also supports GQA on NVIDIA CUDA"
    assert (before in said, since in said) == (not SINCE_2_14, SINCE_2_14)

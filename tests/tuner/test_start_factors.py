"""The start of PiSSA and OLoRA: peft's values, the same digits in every slice, a plain adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llmtune.config.groups.tuner import TunerConfig
from llmtune.engine.distributed import Rank
from llmtune.model.weights.partition_edit import change_own, write_own
from llmtune.storage.layout import ADAPTER_WEIGHTS
from llmtune.train.adapters.start import begin_from_base, take_from_base
from llmtune.tuner.peft_model import add_lora, load_adapter, write_adapter_config
from llmtune.tuner.start_factors import Factors, decompose, set_start, stored_parts, taken_pieces
from llmtune.tuner.stored_adapter import to_file_name

ALONE = Rank(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


def llama() -> Any:
    torch.manual_seed(1)
    sizes: Any = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "vocab_size": 64,
    }
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))


def gpt2() -> Any:
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return torch.as_tensor(model.eval()(torch.arange(40).view(2, 20)).logits)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("build", [llama, gpt2], ids=["linear", "conv1d"])
def test_adapters_and_base_begin_as_pefts(start: str, build: Callable[[], Any]) -> None:
    if (start, build) == ("olora", gpt2):
        pytest.skip("peft decomposes the transposed weight of a Conv1D")
    config = TunerConfig(kind="lora", lora_r=4, lora_alpha=6, init_lora_weights=start)
    own = add_lora(build(), config, "base", 0)
    begin_from_base(own, start, 0, ALONE)
    theirs = get_peft_model(
        build(),
        LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules="all-linear",
            init_lora_weights=start,  # type: ignore[arg-type]
        ),
    )
    wanted = dict(theirs.named_parameters())
    for name, parameter in own.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(own), logits(build()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", ["pissa_niter_8", "olora"])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("build", [llama, gpt2], ids=["linear", "conv1d"])
def test_what_is_stored_fits_the_unchanged_base_and_is_resumed_to_the_bit(
    start: str, use_dora: bool, build: Callable[[], Any], tmp_path: Path
) -> None:
    config = TunerConfig(
        kind="lora",
        lora_r=4,
        lora_alpha=6,
        init_lora_weights=start,
        use_dora=use_dora,
        use_rslora=True,
        rank_pattern={"up_proj": 2, "c_fc": 6},
        alpha_pattern={"down_proj": 3},
    )
    model = add_lora(build(), config, "base", 0)
    set_start(model, begin_from_base(model, start, 0, ALONE))
    # As if it had been trained.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1 if "magnitude" in name else 1.3)

    joined, trained = stored_parts(model), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = parameter.detach()
            if name in joined:
                value = torch.cat([value, joined[name][0]], joined[name][1])
            trained[to_file_name(name)] = value.contiguous()
    save_file(trained, tmp_path / ADAPTER_WEIGHTS)
    write_adapter_config(model, tmp_path)
    plain = PeftModel.from_pretrained(build(), str(tmp_path))
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(plain), logits(build()), atol=1e-3)

    again = add_lora(build(), config, "base", 7)
    loaded = load_adapter(again, tmp_path, has_start=True)
    parts = [part for factors in loaded.values() for part in (factors.a, factors.b)]
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in parts)
    take_from_base(again, loaded, ALONE)
    assert torch.equal(logits(again), logits(model))


@given(
    sides=st.tuples(st.integers(1, 2300), st.integers(1, 9)),
    ranks=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_slices_get_the_same_digits_as_the_whole(
    sides: tuple[int, int], ranks: int, seed: int
) -> None:
    rows, columns = sides
    torch.manual_seed(seed)
    factors = Factors(torch.randn(2, columns), torch.randn(rows, 2))
    weight = torch.randn(rows, columns)

    def subtract(values: torch.Tensor, start: int) -> None:
        for at, piece in taken_pieces(factors, 0.5, start, values.numel()):
            values[at : at + piece.numel()] -= piece

    whole = weight.clone()
    change_own(nn.Parameter(whole), subtract, 0)
    expected = weight - 0.5 * factors.b @ factors.a
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
    size = -(-weight.numel() // ranks)
    padded = torch.cat([weight.reshape(-1), torch.full((ranks * size - weight.numel(),), 7.0)])
    for rank in range(ranks):
        # The parts of a parameter of ZeRO 3 that are used.
        part = SimpleNamespace(
            ds_tensor=padded[rank * size : (rank + 1) * size].clone(),
            ds_numel=weight.numel(),
            nvme_swapper=None,
        )
        change_own(part, subtract, rank)
        count = max(0, min(size, weight.numel() - rank * size))
        own = whole.reshape(-1)[rank * size : rank * size + count]
        assert torch.equal(part.ds_tensor[:count], own)
        assert bool((part.ds_tensor[count:] == 7).all()), "padding stays"
        write_own(part, weight, rank)
        assert torch.equal(part.ds_tensor, padded[rank * size : (rank + 1) * size])


def test_a_decomposition_is_the_best_of_its_rank() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 30)
    singular = torch.linalg.svdvals(weight)
    for start, slack in (("pissa", 1e-5), ("pissa_niter_16", 1e-3)):
        factors = decompose(weight, 5, 2.0, start)
        rest = torch.linalg.norm(weight - 2.0 * factors.b @ factors.a)
        assert float(rest) == pytest.approx(float(singular[5:].norm()), rel=slack), start

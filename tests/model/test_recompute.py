"""Whatever number of layers is computed again, losses and gradients are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from llmtune.config.groups.tuner import FreezeConfig, TunerConfig
from llmtune.model.build import recompute_layers
from llmtune.plan.abilities import NEVER, ONE_BY_ONE, TOGETHER, find_recomputing
from llmtune.plan.memory.recomputed_layers import RecomputedLayers
from llmtune.tuner.blocks import find_blocks
from llmtune.tuner.head import NO_HEAD, Head
from llmtune.tuner.peft_model import add_lora
from llmtune.tuner.tuner import TUNERS, mark_trained
from tests.architectures.families import FAMILIES

LAYERS = 4
SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
}
GATED = {**SIZE, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("AutoModelForCausalLM", GATED),
    "qwen3": ("AutoModelForCausalLM", {**GATED, "head_dim": 8}),
    "gpt2": ("AutoModelForCausalLM", {"vocab_size": 97, "n_embd": 32, "n_layer": LAYERS}),
    "bert": ("AutoModelForSequenceClassification", SIZE),
}
TUNERS_OF = {
    "full": TunerConfig(kind="full"),
    "lora": TunerConfig(kind="lora"),
    "freeze": TunerConfig(kind="freeze", freeze=FreezeConfig(last_layers=3)),
}


def build(family: str, tuner: str) -> Any:
    """Build a model whose dropout is drawn from the same numbers in every call."""
    model_class, numbers = MODELS[family]
    config = transformers.AutoConfig.for_model(family, **numbers, n_head=4)
    torch.manual_seed(0)
    model = getattr(transformers, model_class).from_config(config)
    model.config.use_cache = False
    settings = TUNERS_OF[tuner]
    if tuner == "lora":
        head = Head(modules=("classifier",)) if family == "bert" else NO_HEAD
        return add_lora(model, settings, "base", 0, head)
    if tuner == "freeze":
        mark_trained(TUNERS.find("freeze"), model, settings)
    return model


def run(model: Any) -> tuple[float, dict[str, torch.Tensor], list[int]]:
    """Return loss, gradients, and how often each layer was computed."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    blocks = find_blocks(base)
    assert blocks is not None
    calls = [0] * LAYERS
    for index, block in enumerate(blocks.modules):
        # Of a layer, the first module that it calls: its own hooks are outside of a checkpoint.
        inner = next(
            m
            for m in block.modules()
            if isinstance(m, torch.nn.LayerNorm) or "Norm" in type(m).__name__
        )

        def count(*_: Any, at: int = index) -> None:
            calls[at] += 1

        inner.register_forward_hook(count)
    model.train()
    torch.manual_seed(1)
    ids = torch.randint(0, 90, (2, 12))
    output = model(input_ids=ids).logits
    loss = output.float().square().mean()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found, calls


@pytest.mark.parametrize("tuner", TUNERS_OF)
@pytest.mark.parametrize("family", MODELS)
def test_losses_and_gradients_are_those_without_it(family: str, tuner: str) -> None:
    total = 3 if tuner == "freeze" else LAYERS
    loss, gradients, calls = run(build(family, tuner))
    assert calls == [1] * LAYERS
    assert gradients
    for count in range(total + 1):
        model = build(family, tuner)
        recompute_layers(model, RecomputedLayers(count, total))
        again, found, calls = run(model)
        assert again == loss, count
        assert found.keys() == gradients.keys()
        assert all(torch.equal(found[name], gradients[name]) for name in gradients), count
        first = LAYERS - total
        assert calls == [1] * first + [2] * count + [1] * (total - count), count


#: transformers says that it cannot recompute the layers of these.
WITHOUT = {"gpt_neox_japanese", "openai-gpt", "ctrl", "jetmoe"}


def test_layers_of_the_fields_architectures_are_recomputed_one_by_one() -> None:
    found = {}
    for name, numbers in FAMILIES.items():
        if name == "rwkv":
            # transformers starts a process to look for a compiler of its kernel.
            continue
        kind = numbers.get("model_type", name)
        rest = {key: value for key, value in numbers.items() if key != "model_type"}
        config = transformers.AutoConfig.for_model(kind, **{**rest, "pad_token_id": 0})
        with torch.device("meta"):
            found[name] = find_recomputing(transformers.AutoModelForCausalLM.from_config(config))
    assert {name for name, how in found.items() if how == NEVER} == WITHOUT
    assert {how for name, how in found.items() if name not in WITHOUT} == {ONE_BY_ONE}


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        (
            "bart",
            {
                "vocab_size": 97,
                "d_model": 32,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 48,
                "decoder_ffn_dim": 48,
            },
        ),
        ("t5", {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}),
    ],
)
def test_two_stacks_have_one_switch(kind: str, numbers: dict[str, Any]) -> None:
    config = transformers.AutoConfig.for_model(kind, **numbers)
    model: Any = transformers.AutoModelForSequenceClassification.from_config(config)
    assert find_recomputing(model) == TOGETHER
    recompute_layers(model, RecomputedLayers(2, 2))
    assert model.is_gradient_checkpointing

"""Patterns of ranks and scales mean what they mean to peft, in the plan too."""

from __future__ import annotations

import pytest
from peft.utils.other import get_pattern_key

from llmtune.config.compose import compose_config
from llmtune.errors import ConfigError
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.run.settings import find_problems
from llmtune.tuner.lora_settings import lora_scale, match_pattern

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.1.mlp.up_proj",
    "lm_head",
]
PATTERNS = [
    "q_proj",
    "0.self_attn.q_proj",
    r"layers\.1\..*",
    "^model.layers.0.*",
    "proj",
    "lm_head",
    "model",
    r".*\.(up|q)_proj",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_key_matches_what_it_matches_for_peft(pattern: str) -> None:
    for module in MODULES:
        theirs = get_pattern_key([pattern], module)
        assert match_pattern({pattern: 5}, module, 9) == (5 if theirs == pattern else 9), module


def test_the_plan_counts_each_modules_own_rank() -> None:
    config = compose_config(
        ["model=tiny", "tuner.target_modules=q_proj,v_proj", "tuner.rank_pattern={q_proj: 2}"]
    ).config
    shape = resolve_shape(config.model, config.tuner)
    ranks = {
        (tensor.name.split(".")[4], tensor.name.split(".")[5]): tensor.numel
        for tensor in shape.tensors
        if tensor.adapter
    }
    assert ranks == {
        ("q_proj", "lora_A"): 2 * 64,
        ("q_proj", "lora_B"): 2 * 64,
        ("v_proj", "lora_A"): 16 * 64,
        ("v_proj", "lora_B"): 16 * 32,
    }


def test_a_pattern_whose_order_decides_is_refused() -> None:
    given = ["model=tiny", "tuner.alpha_pattern={q_proj: 2, 0.self_attn.q_proj: 3}"]
    config = compose_config(given).config
    with pytest.raises(
        ConfigError,
        match=r"layers.0.self_attn.q_proj is 2 by the first key that matches and 3 in the stored",
    ):
        resolve_shape(config.model, config.tuner)
    # The same keys the other way round are stored as they are given.
    config.tuner.alpha_pattern = {"0.self_attn.q_proj": 3, "q_proj": 2}
    assert resolve_shape(config.model, config.tuner).adapter_parameters > 0


def test_the_scale_of_rank_stabilised_adapters() -> None:
    assert (lora_scale(32, 16, use_rslora=False), lora_scale(32, 16, use_rslora=True)) == (2, 8)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("tuner.rank_pattern={q_proj: 0}", "numbers above 0 by module"),
        ("tuner.rank_pattern={q_proj: true}", "numbers above 0 by module"),
        ("tuner.alpha_pattern={q_proj: nan}", "numbers above 0 by module"),
        ("tuner.alpha_pattern={q_proj: inf}", "numbers above 0 by module"),
        ("tuner.alpha_pattern={q_proj: a}", "numbers above 0 by module"),
        ("tuner.init_lora_weights=loftq", "loftq needs tuner=qlora"),
        ("tuner.init_lora_weights=pissa_niter_0", "pissa_niter_N with a number N"),
        ("tuner.init_lora_weights=eva", "default, gaussian, orthogonal, olora, pissa"),
        ("tuner.lora_plus_ratio=0", "must be above 0"),
        ("tuner.bias=some", "none, all, lora_only"),
        ("tuner.layers_to_transform=[-1]", "-1 is no number of a layer"),
        ("tuner.exclude_modules=[]", "a list such as"),
        ("tuner.target_modules='(a+)+'", "it repeats what can itself be matched"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(override: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        compose_config(["model=tiny", override], more_rules=find_problems)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["tuner=full", "tuner.use_dora=true"], "tuner.use_dora=True needs tuner=lora"),
        (["tuner=full", "tuner.bias=all"], "tuner.bias=all needs tuner=lora"),
        (["tuner=qlora", "tuner.init_lora_weights=loftq"], "take export.merge_onto=nf4"),
        (
            ["tuner=pissa", "tuner.kind=qlora", "export.merge_onto=nf4"],
            "take export.merge_onto=original",
        ),
        (
            ["tuner=qlora", "tuner.init_lora_weights=loftq", "tuner.adapter_path=/x"],
            "the adapter has its values",
        ),
        (["tuner=pissa", "tuner.adapter_path=/x"], "the adapter has its values"),
        (
            ["tuner.init_lora_weights=orthogonal", "tuner.lora_r=5"],
            "needs even ranks, and tuner has lora_r=5",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        compose_config(["model=tiny", *overrides], more_rules=find_problems)


@pytest.mark.parametrize(
    "overrides",
    [
        ["tuner=qlora", "tuner.use_dora=true"],
        ["tuner=pissa", "tuner.kind=qlora"],
        ["tuner=qlora", "tuner.init_lora_weights=loftq", "export.merge_onto=nf4"],
        ["tuner=qlora", "tuner.init_lora_weights=loftq", "export=adapter"],
        ["tuner=qlora", "tuner.init_lora_weights=loftq", "export=none"],
    ],
)
def test_kinds_on_a_base_in_4_bits_are_taken(overrides: list[str]) -> None:
    compose_config(["model=tiny", *overrides], more_rules=find_problems)

"""What ``all-linear`` reaches is what peft adapts, and what must be left alone is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmtune.config.compose import compose_config
from llmtune.config.groups.model import ModelConfig
from llmtune.config.groups.tuner import TunerConfig
from llmtune.errors import ConfigError
from llmtune.optimizer.param_groups import plain_name
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.plan.resolve import plan_candidate, resolve_ladder
from llmtune.tuner.peft_model import add_lora
from tests.architectures.families import FAMILIES


def numbers(family: str) -> dict[str, Any]:
    return {"model_type": family, **FAMILIES[family]}


def lora(**changes: Any) -> TunerConfig:
    return replace(compose_config(["model=tiny", "tuner=lora"]).config.tuner, **changes)


def adapt(family: str, tuner: TunerConfig) -> Any:
    given = numbers(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(given.pop("model_type"), **given)
        )
    return add_lora(model, tuner, "base", 0)


@pytest.mark.parametrize(
    ("family", "reached", "alone"),
    [
        ("mixtral", {"q_proj", "k_proj", "v_proj", "o_proj"}, set()),
        (
            "qwen2_moe",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
            {"shared_expert_gate"},
        ),
        ("phimoe", {"q_proj", "k_proj", "v_proj", "o_proj"}, {"router"}),
        ("jetmoe", {"kv_proj"}, {"layer"}),
        (
            "llama4_text",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
            {"router"},
        ),
        (
            "deepseek_v3",
            {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
            {"gate_proj", "up_proj", "down_proj"},
        ),
        ("mamba", {"in_proj"}, {"x_proj", "dt_proj", "out_proj"}),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}, set()),
        (
            "qwen3",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
            set(),
        ),
    ],
)
def test_all_linear_reaches_layers_and_no_router(
    family: str, reached: set[str], alone: set[str]
) -> None:
    shape = resolve_shape(ModelConfig(name_or_path="m", config=numbers(family)), lora())
    assert set(shape.adapted) == reached
    assert set(shape.left_alone) == alone
    real = [
        name
        for name, parameter in adapt(family, lora()).named_parameters()
        if parameter.requires_grad
    ]
    assert sorted(real) == sorted(
        f"base_model.model.{tensor.name}" for tensor in shape.tensors if tensor.trained
    )
    assert not any(
        ".router" in name or name.endswith("gate") or ".experts." in name
        for name in real
        if family != "jetmoe"
    )


@pytest.mark.parametrize(
    ("family", "module", "reason"),
    [
        ("phimoe", "router", "chooses among the experts"),
        ("deepseek_v3", "down_proj", "peft treats its name as that of the stacked experts"),
        ("mamba2", "out_proj", "passes the weight to a kernel"),
    ],
)
def test_a_layer_that_must_be_left_alone_is_refused_by_name(
    family: str, module: str, reason: str
) -> None:
    with pytest.raises(
        ConfigError, match=rf"tuner.target_modules: {module} cannot have an adapter: .*{reason}"
    ):
        resolve_shape(
            ModelConfig(name_or_path="m", config=numbers(family)), lora(target_modules=[module])
        )


def test_a_router_that_is_named_is_adapted() -> None:
    tuner = lora(target_modules=["q_proj", "shared_expert_gate"])
    shape = resolve_shape(ModelConfig(name_or_path="m", config=numbers("qwen2_moe")), tuner)
    real = {n for n, p in adapt("qwen2_moe", tuner).named_parameters() if p.requires_grad}
    assert real == {f"base_model.model.{tensor.name}" for tensor in shape.tensors if tensor.trained}
    assert {name.split(".")[-4] for name in real} == {"q_proj", "shared_expert_gate"}
    assert shape.left_alone == ()


def test_layers_of_mixtures_that_are_named_are_adapted() -> None:
    tuner = lora(target_modules=["q_proj", "v_proj"])
    real = {
        name
        for name, parameter in adapt("mixtral", tuner).named_parameters()
        if parameter.requires_grad
    }
    shape = resolve_shape(ModelConfig(name_or_path="m", config=numbers("mixtral")), tuner)
    assert real == {f"base_model.model.{tensor.name}" for tensor in shape.tensors if tensor.trained}
    assert len(real) == 8


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only", "target_modules": ["c_attn"], "layers_to_transform": [1]},
        {"modules_to_save": ["ln_f", "wpe"], "exclude_modules": r".*\.0\.mlp\..*"},
        {"target_modules": r".*\.1\.(attn\.c_attn|mlp\.c_fc)", "use_dora": True},
        {"modules_to_save": ["h.0.mlp"], "exclude_modules": ["c_attn"]},
    ],
    ids=str,
)
def test_the_plan_counts_what_is_trained(changes: dict[str, Any]) -> None:
    tuner = lora(**changes)
    shape = resolve_shape(ModelConfig(name_or_path="m", config=numbers("gpt2")), tuner)
    real = {
        plain_name(name): parameter.numel()
        for name, parameter in adapt("gpt2", tuner).named_parameters()
        if parameter.requires_grad
    }
    assert real == {tensor.name: tensor.numel for tensor in shape.tensors if tensor.trained}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"exclude_modules": ["q_prj"]}, "exclude_modules: q_prj matches none of the layers"),
        ({"exclude_modules": ".*"}, "tuner.exclude_modules leave no layer"),
        ({"layers_to_transform": [7]}, "the model has 2 layers, numbered from 0, and no layer 7"),
        ({"target_modules": ".*q_prj"}, "'.*q_prj'] matches no linear layer"),
        ({"modules_to_save": ["score"]}, "modules_to_save: score matches no module"),
        ({"modules_to_save": ["lm_head"]}, "wte.weight and lm_head.weight are one tensor"),
        ({"init_lora_weights": "pissa", "lora_r": 999}, "takes 999 directions of transformer"),
    ],
    ids=str,
)
def test_a_key_that_matches_nothing_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_shape(ModelConfig(name_or_path="m", config=numbers("gpt2")), lora(**changes))
    assert text in str(caught.value)


def test_biases_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="tuner.bias=all: the model has no bias"):
        resolve_shape(ModelConfig(name_or_path="m", config=numbers("qwen3")), lora(bias="all"))


def test_a_run_says_what_all_linear_means_for_experts() -> None:
    config = compose_config(["model=tiny", "data.max_seq_length=64", "tuner=lora"]).config
    config = replace(config, model=replace(config.model, config=numbers("mixtral")))
    ladder = resolve_ladder(config)
    assert ladder.chosen is not None
    notes = " ".join(plan_candidate(config, ladder, ladder.chosen).notes)
    assert (
        "all-linear: adapters on k_proj, o_proj, q_proj, v_proj; none on the router and the experts"
        in notes
    )
    dense = compose_config(["model=tiny", "tuner=lora"]).config
    ladder = resolve_ladder(dense)
    assert ladder.chosen is not None
    assert "all-linear" not in " ".join(plan_candidate(dense, ladder, ladder.chosen).notes)

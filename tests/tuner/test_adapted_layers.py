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

"""Adapters on stacked experts are peft's in every family; what cannot be is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from llmtune.config.compose import compose_config
from llmtune.config.groups.model import ModelConfig
from llmtune.config.groups.tuner import TunerConfig
from llmtune.errors import ConfigError
from llmtune.optimizer.param_groups import plain_name
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.plan.memory.shapes import ModelShape
from llmtune.tuner.layer_matrices import find_layer_matrices
from llmtune.tuner.peft_model import add_lora, find_read_elsewhere
from llmtune.tuner.stacks.stacked_weights import find_stacks, name_in_layers
from llmtune.tuner.tuner import TUNERS
from tests.architectures.families import FAMILIES

STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MIXTURES = [
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "gpt_oss"),
    *("llama4_text", "jetmoe", "deepseek_v3", "qwen3_next", "granitemoehybrid", "minimax"),
]


def build(family: str) -> Any:
    given = {"model_type": family, **FAMILIES[family]}
    torch.manual_seed(0)
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    return AutoModelForCausalLM.from_config(config)


def lora(*overrides: str, **changes: Any) -> TunerConfig:
    tuner = compose_config(["model=tiny", "tuner=lora", "tuner.lora_r=4", *overrides]).config.tuner
    return replace(tuner, **changes)


def shape_of(family: str, tuner: TunerConfig) -> ModelShape:
    numbers = {"model_type": family, **FAMILIES[family]}
    return resolve_shape(ModelConfig(name_or_path="m", config=numbers), tuner)


@pytest.fixture(scope="module")
def tuner() -> TunerConfig:
    return lora("tuner.target_modules=[]", f"tuner.target_parameters=[{','.join(STACKS)}]")


@pytest.mark.parametrize("kernel", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", MIXTURES)
def test_losses_and_gradients_are_pefts(family: str, kernel: str, tuner: TunerConfig) -> None:
    model = build(family)
    if model.config._experts_implementation == "eager" and kernel != "eager":
        pytest.skip("it has no other kernel")
    model.config._experts_implementation = kernel
    names = name_in_layers(model, find_stacks(model))
    assert names
    settings = LoraConfig(r=4, lora_alpha=32, target_modules=[], target_parameters=names)
    peft_model: Any = get_peft_model(copy.deepcopy(model), settings)
    own = add_lora(copy.deepcopy(model), replace(tuner, target_parameters=names), "base", 0)
    own.load_state_dict(peft_model.state_dict())
    found = []
    for one in (peft_model, own):
        torch.manual_seed(1)
        for parameter in one.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        tokens = torch.arange(16).reshape(2, 8)
        loss = one(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        gradients = {name: p.grad for name, p in one.named_parameters() if p.requires_grad}
        found.append((loss, gradients))
    # A CPU's batched products round by where their operands lie in memory.
    exact = kernel != "batched_mm"
    same = torch.equal if exact else partial(torch.allclose, rtol=1e-5, atol=1e-7)
    assert same(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert same(gradient, found[1][1][name]), name
        assert bool(gradient.any()), name
    # Nothing of the model is left in the place of a parameter.
    names_left = {name for name, _ in own.named_parameters() if ".base_layer.base_layer." in name}
    assert all(not name.endswith("original") for name in names_left)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "jetmoe"])
@pytest.mark.parametrize("changes", [{}, {"layers_to_transform": [1]}, {"modules": "all-linear"}])
def test_the_plan_counts_what_is_trained(
    family: str, changes: dict[str, Any], tuner: TunerConfig
) -> None:
    model = build(family)
    names = name_in_layers(model, find_stacks(model))
    settings = {key: value for key, value in changes.items() if key != "modules"}
    chosen = replace(
        tuner, target_parameters=names, target_modules=changes.get("modules", []), **settings
    )
    shape = shape_of(family, chosen)
    adapted = add_lora(model, chosen, "base", 0)
    real = {
        plain_name(name): parameter.numel()
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    planned = {tensor.name: tensor.numel for tensor in shape.tensors if tensor.trained}
    assert list(planned.items()) == list(real.items())
    matrices = {plain_name(name) for name in find_layer_matrices(adapted)}
    trained = {tensor.name for tensor in shape.tensors if tensor.trained and tensor.layer_matrix}
    assert trained == matrices & set(real)
    # ZeRO 3 is told of everything that a layer around a stack reads.
    read = {id(parameter) for _, parameter in find_read_elsewhere(adapted)}
    assert {id(p) for name, p in adapted.named_parameters() if ".experts.lora_" in name} <= read


def test_the_unreached_stacks_are_named_as_the_key_takes_them(tuner: TunerConfig) -> None:
    for family, name in (("mixtral", "mlp"), ("granitemoe", "block_sparse_moe")):
        shape = shape_of(family, lora())
        ends = [f"{name}.experts.gate_up_proj", f"{name}.experts.down_proj"]
        assert list(shape.unreached_stacks) == ends
        assert shape.stacked_parameters > 0
        reached = shape_of(family, replace(tuner, target_parameters=ends))
        assert reached.unreached_stacks == ()
        assert reached.stacked_parameters == 0
        half = shape_of(family, replace(tuner, target_parameters=ends[:1]))
        assert list(half.unreached_stacks) == ends[1:]


@pytest.mark.parametrize(
    ("family", "changes", "text"),
    [
        ("mixtral", {"target_parameters": ["experts.w1"]}, "experts.w1 names no stack of experts'"),
        ("mixtral", {"target_parameters": ["w1"]}, "the model has [mlp.experts.gate_up_proj,"),
        ("qwen3", {"target_parameters": ["w1"]}, "the model has none"),
        (
            "mixtral",
            {"target_parameters": ["q_proj.weight"]},
            "q_proj.weight (32 x 32) is no stack of experts' matrices; layers are named with",
        ),
        ("gpt_oss", {"target_parameters": ["gate_up_proj_bias"]}, "(4 x 96) is no stack"),
        (
            "mixtral",
            {"target_parameters": STACKS, "modules_to_save": ["mlp"]},
            "is in a module that tuner.modules_to_save trains whole",
        ),
        (
            "mixtral",
            {"target_parameters": STACKS, "layers_to_transform": [2]},
            "numbered from 0, and no layer 2",
        ),
    ],
    ids=str,
)
def test_a_name_that_is_no_stack_is_refused(
    family: str, changes: dict[str, Any], text: str, tuner: TunerConfig
) -> None:
    with pytest.raises(ConfigError) as caught:
        shape_of(family, replace(tuner, **changes))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("tuner=dora", "stacks of experts have no DoRA"),
        ("tuner.lora_dropout=0.1", "so that there is nothing to drop"),
        ("tuner=pissa", "begin as default or gaussian"),
        ("tuner.init_lora_weights=orthogonal", "begin as default or gaussian"),
        ("tuner=full", "needs tuner=lora"),
    ],
)
def test_what_peft_does_not_have_for_stacks_is_refused(override: str, text: str) -> None:
    overrides = ["model=tiny", override, "tuner.target_parameters=[experts.down_proj]"]
    tuner = compose_config(overrides).config.tuner
    assert text in " ".join(TUNERS.find(tuner.kind).find_problems(tuner))


def test_no_target_at_all_is_refused() -> None:
    tuner = lora("tuner.target_modules=[]")
    (problem,) = TUNERS.find(tuner.kind).find_problems(tuner)
    assert problem.startswith("tuner.target_modules=[]: 'all-linear'")
    assert not TUNERS.find("lora").find_problems(replace(tuner, target_parameters=STACKS))

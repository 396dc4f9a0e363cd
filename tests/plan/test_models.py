"""The models of ``conf/model/``: their sizes, their positions, and a step of a shrunken copy."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from llmtune.config.compose import compose_config
from llmtune.plan.architecture.load import load_architecture
from llmtune.plan.architecture.shrink import VOCABULARY, shrink
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.plan.memory.shapes import ModelShape
from tests.support import ROOT

#: Option -> parameters, as published with the weights (tied ones once, of Gemma 3 the text part),
#: and tokens of the longest row.
MODELS = {
    "gemma3_12b": (11_766_034_176, 131_072),
    "gemma3_1b": (999_885_952, 32_768),
    "gemma3_27b": (27_009_346_304, 131_072),
    "gemma3_4b": (3_880_263_168, 131_072),
    "gpt_oss_20b": (20_914_757_184, 131_072),
    "llama2_7b": (6_738_415_616, 4_096),
    "llama31_70b": (70_553_706_496, 131_072),
    "llama31_8b": (8_030_261_248, 131_072),
    "llama32_1b": (1_235_814_400, 131_072),
    "llama32_3b": (3_212_749_824, 131_072),
    "llama33_70b": (70_553_706_496, 131_072),
    "llama3_70b": (70_553_706_496, 8_192),
    "llama3_8b": (8_030_261_248, 8_192),
    "mistral_7b": (7_248_023_552, 32_768),
    "mixtral_8x7b": (46_702_792_704, 32_768),
    "phi4": (14_659_507_200, 16_384),
    "qwen25_0_5b": (494_032_768, 32_768),
    "qwen25_14b": (14_770_033_664, 32_768),
    "qwen25_1_5b": (1_543_714_304, 32_768),
    "qwen25_32b": (32_763_876_352, 32_768),
    "qwen25_72b": (72_706_203_648, 32_768),
    "qwen25_7b": (7_615_616_512, 32_768),
    "qwen3_0_6b": (596_049_920, 40_960),
    "qwen3_14b": (14_768_307_200, 40_960),
    "qwen3_1_7b": (1_720_574_976, 40_960),
    "qwen3_30b_a3b": (30_532_122_624, 40_960),
    "qwen3_32b": (32_762_123_264, 40_960),
    "qwen3_4b": (4_022_468_096, 40_960),
    "qwen3_8b": (8_190_735_360, 40_960),
    "smollm2_135m": (134_515_008, 8_192),
    "smollm2_1_7b": (1_711_376_384, 8_192),
    "smollm2_360m": (361_821_120, 8_192),
}
#: Encoders are in ``test_encoders.py``.
OTHERS = ("custom", "tiny")


@cache
def shape_of(option: str) -> ModelShape:
    config = compose_config([f"model={option}", "tuner=lora"], planning=True).config
    return resolve_shape(config.model, config.tuner)


def test_every_language_model_is_here() -> None:
    files = {file.stem: yaml.safe_load(file.read_text()) for file in ROOT.glob("conf/model/*.yaml")}
    encoders = {
        name
        for name, values in files.items()
        if str(values["config"].get("model_type")).endswith(("bert", "roberta", "deberta-v2"))
    }
    assert set(files) - encoders - set(OTHERS) == set(MODELS)


@pytest.mark.parametrize("option", MODELS)
def test_a_model_has_its_published_size_and_positions(option: str) -> None:
    parameters, positions = MODELS[option]
    shape = shape_of(option)
    assert (shape.parameters, shape.max_positions) == (parameters, positions)
    assert shape.adapter_parameters > 0
    assert shape.trainable


@pytest.mark.parametrize("option", MODELS)
def test_a_shrunken_copy_learns(option: str) -> None:
    """One step of plain gradient descent, in fp32, on all weights."""
    model_config = compose_config([f"model={option}"], planning=True).config.model
    small = shrink(load_architecture(model_config))
    small.num_hidden_layers = 2
    if getattr(small, "layer_types", None):
        # One of each kind, where there are two.
        small.layer_types = [small.layer_types[0], small.layer_types[-1]]
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(small).float()
    tokens = torch.randint(VOCABULARY, (2, 24))
    before = model(input_ids=tokens, labels=tokens).loss
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad if parameter.grad is not None else 0
    after = model(input_ids=tokens, labels=tokens).loss
    assert after.item() < before.item() - 0.01

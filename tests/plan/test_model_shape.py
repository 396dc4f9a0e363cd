"""The parameters that a plan lists, against those of a live model that has new tokens."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmtune.config.compose import compose_config
from llmtune.config.groups.model import ModelConfig
from llmtune.errors import ConfigError
from llmtune.model.source import resolve_model_folder
from llmtune.model.token_folder import find_token_ids, resolve_base_folder
from llmtune.optimizer.param_groups import plain_name
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.plan.memory.shapes import ModelShape
from llmtune.tuner.token_rows.tables import with_new_tokens
from llmtune.tuner.tuner import TUNERS
from tests.architectures.families import FAMILIES

NEW = ["<|a|>", "<|b|>", "<|c|>"]


def model_config(family: str, **numbers: Any) -> ModelConfig:
    config = compose_config(["model=tiny"]).config.model
    sizes = {**FAMILIES[family], **numbers}
    return replace(config, config={"model_type": family, **sizes})


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize(
    ("family", "tied", "rows"),
    [
        *itertools.product(["llama", "gpt2", "mixtral"], [True, False], [512]),
        # The tokenizer of 512 tokens leaves rows for two of the three, or for all.
        ("llama", False, 514),
        ("llama", True, 640),
    ],
)
def test_tables_with_new_tokens_are_planned_as_they_are_loaded(
    family: str, tied: bool, rows: int, kind: str, tmp_path: Path
) -> None:
    config = model_config(family, tie_word_embeddings=tied, vocab_size=rows)
    # The plan reads the tokenizer of a folder.
    config = replace(config, name_or_path=str(resolve_model_folder(config, tmp_path)), config=None)
    keys: dict[str, Any] = {"trainable_token_indices": [5]} if kind == "lora" else {}
    settings = compose_config(["model=tiny", f"tuner={kind}"]).config.tuner
    settings = replace(settings, new_tokens=NEW, **keys)
    shape = resolve_shape(config, settings, tmp_path)

    folder = resolve_base_folder(config, NEW, tmp_path, lambda _: None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert shape.outputs == model.config.vocab_size == max(rows, 515)
    assert shape.vocab_size == rows
    tuner = with_new_tokens(model, settings, find_token_ids(folder, NEW))
    adapted = TUNERS.find(kind).attach(model, tuner, "base", 0)
    live = {
        plain_name(name): (tuple(one.shape), one.requires_grad)
        for name, one in adapted.named_parameters()
    }
    assert {one.name: (one.shape, one.trained) for one in shape.tensors} == live
    trained = [one.numel() for one in adapted.parameters() if one.requires_grad]
    assert shape.trainable_parameters == sum(trained)


def test_tables_of_a_tokenizer_elsewhere_have_no_rows_to_spare() -> None:
    def shape_of(*overrides: str) -> ModelShape:
        config = compose_config(["model=qwen3_8b", "tuner=full", *overrides]).config
        return resolve_shape(config.model, config.tuner)

    plain, grown = shape_of(), shape_of("tuner.new_tokens=['<|a|>','<|b|>']")
    assert grown.parameters - plain.parameters == 2 * 2 * 4096
    assert grown.outputs == plain.outputs + 2
    assert grown.vocab_size == plain.vocab_size


def test_the_shape_is_counted_again_where_the_tokenizer_has_changed(tmp_path: Path) -> None:
    config = model_config("llama", vocab_size=640)
    folder = tmp_path / "model"
    folder.symlink_to(resolve_model_folder(config, tmp_path))
    config = replace(config, name_or_path=str(folder), config=None)
    settings = replace(compose_config(["model=tiny"]).config.tuner, new_tokens=NEW)
    assert resolve_shape(config, settings, tmp_path).outputs == 640
    full = model_config("llama", vocab_size=640, hidden_size=32)
    other = resolve_base_folder(full, [f"<|{n}|>" for n in range(128)], tmp_path, lambda _: None)
    tokenizer = (other / "tokenizer.json").read_bytes()
    own = folder.resolve() / "tokenizer.json"
    own.unlink()
    own.write_bytes(tokenizer)
    assert resolve_shape(config, settings, tmp_path).outputs == 643


@pytest.mark.parametrize(
    ("name", "is_packed"),
    [("down_proj", True), ("mlp", True), ("q_proj", True), ("norm", False), ("lm_head", False)],
)
def test_a_weight_in_4_bits_is_not_trained_whole(name: str, is_packed: bool) -> None:
    keys = ["model.config.tie_word_embeddings=false", f"tuner.modules_to_save=[{name}]"]
    for kind in ("lora", "qlora"):
        config = compose_config(["model=tiny", f"tuner={kind}", *keys]).config
        if is_packed and kind == "qlora":
            with pytest.raises(ConfigError, match=f"{name}.*is kept in 4 bits"):
                resolve_shape(config.model, config.tuner)
        else:
            assert resolve_shape(config.model, config.tuner).trainable_parameters


def test_a_head_is_not_in_4_bits_and_may_be_named() -> None:
    keys = ["model.task=sequence_classification", "tuner.modules_to_save=[classifier]"]
    config = compose_config(["model=tiny_bert", "tuner=qlora", *keys]).config
    assert resolve_shape(config.model, config.tuner).trainable_parameters

"""New tokens get rows in a folder of their own, which begin as the mean of the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtune.config.compose import compose_config
from llmtune.config.groups.model import ModelConfig
from llmtune.errors import ConfigError
from llmtune.model.skeleton import build_skeleton
from llmtune.model.source import resolve_model_folder
from llmtune.model.token_folder import find_token_ids, resolve_base_folder
from llmtune.model.weights.check import compare_weights
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.run.settings import find_problems
from llmtune.tuner.kinds.lora import LoraTuner
from llmtune.tuner.token_rows.tables import with_new_tokens
from tests.architectures.families import FAMILIES

NEW = ["<|a|>", "<|b|>", "<|c|>"]


def model_config(family: str, **numbers: Any) -> ModelConfig:
    config = compose_config(["model=tiny"]).config.model
    sizes = {**FAMILIES[family], "vocab_size": 512, **numbers}
    return replace(config, config={"model_type": family, **sizes})


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_new_rows_are_the_mean_of_the_others(family: str, tied: bool, tmp_path: Path) -> None:
    config = model_config(family, tie_word_embeddings=tied)
    said: list[str] = []
    base = resolve_model_folder(config, tmp_path)
    files = {file: file.read_bytes() for file in base.iterdir()}
    folder = resolve_base_folder(config, NEW, tmp_path, said.append)
    assert {file: file.read_bytes() for file in base.iterdir()} == files

    # The tokenizer has them behind all others.
    before, after = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(folder)
    known = len(before)
    assert find_token_ids(folder, NEW) == [known, known + 1, known + 2]
    assert after("x<|b|>y").input_ids == [
        *before("x", add_special_tokens=False).input_ids,
        known + 1,
        *before("y", add_special_tokens=False).input_ids,
    ]
    assert after.decode([known + 1], skip_special_tokens=True) == "<|b|>"

    # So have the tables, and nothing else is different.
    old, new = load(base), load(folder)
    rows = old.config.vocab_size
    assert new.config.vocab_size == max(rows, known + 3)
    assert f"{known + 3 - rows} rows" in said[-1] or rows >= known + 3
    own = new.state_dict()
    tables = {id(old.get_input_embeddings().weight), id(old.get_output_embeddings().weight)}
    assert len(tables) == (1 if tied else 2)
    for name, tensor in old.state_dict(keep_vars=True).items():
        if id(tensor) not in tables:
            assert torch.equal(own[name], tensor), name
            continue
        assert torch.equal(own[name][:known], tensor[:known]), name
        mean = tensor[:known].double().mean(0).to(tensor.dtype)
        assert all(torch.equal(row, mean) for row in own[name][known : known + 3]), name
    assert compare_weights(build_skeleton(folder), folder).missing == ()


def test_spare_rows_are_used_before_tables_grow(tmp_path: Path) -> None:
    config = model_config("llama", vocab_size=700)
    known = len(AutoTokenizer.from_pretrained(resolve_model_folder(config, tmp_path)))
    assert known < 700 - len(NEW)
    said: list[str] = []
    folder = resolve_base_folder(config, NEW, tmp_path, said.append)
    assert load(folder).config.vocab_size == 700
    assert "which had rows to spare" in said[-1]


def test_equal_tokens_make_one_folder_and_others_another(tmp_path: Path) -> None:
    config = model_config("llama")
    folders = [
        resolve_base_folder(config, tokens, tmp_path, lambda _: None)
        for tokens in (NEW, NEW, NEW[::-1], [])
    ]
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3
    assert folders[3] == resolve_model_folder(config, tmp_path)
    assert find_token_ids(folders[2], NEW) == find_token_ids(folders[0], NEW)[::-1]


def test_a_token_that_is_there_already_is_refused(tmp_path: Path) -> None:
    config = model_config("llama")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_folder(config, tmp_path))
    number = tokenizer.eos_token_id
    with pytest.raises(ConfigError, match=rf"trainable_token_indices=\[{number}\]"):
        resolve_base_folder(config, ["<|a|>", tokenizer.eos_token], tmp_path, lambda _: None)


def test_a_tokenizer_with_tokens_that_have_no_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokens, and the model 128 rows for them"):
        resolve_base_folder(model_config("llama", vocab_size=128), NEW, tmp_path, lambda _: None)


def test_a_projection_with_a_bias_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="output projection has a bias"):
        resolve_base_folder(model_config("phi"), NEW, tmp_path, lambda _: None)


def test_adapters_train_the_rows_of_new_tokens_in_both_tables(tmp_path: Path) -> None:
    config = model_config("llama", tie_word_embeddings=False)
    folder = resolve_base_folder(config, NEW, tmp_path, lambda _: None)
    numbers = find_token_ids(folder, NEW)
    tuner = replace(
        compose_config(["model=tiny"]).config.tuner,
        new_tokens=NEW,
        trainable_token_indices=[5],
    )
    model = load(folder)
    wrapped = LoraTuner().attach(model, with_new_tokens(model, tuner, numbers), "base", 0)
    assert wrapped.peft_config["default"].trainable_token_indices == {
        "model.embed_tokens": [5, *numbers],
        "lm_head": numbers,
    }
    # The plan knows how many there are, before anything is read.
    shape = resolve_shape(config, tuner)
    trained = {name: one.numel() for name, one in wrapped.named_parameters() if one.requires_grad}
    assert shape.trainable_parameters == sum(trained.values())
    assert [tensor.numel for tensor in shape.tensors if "trainable_tokens" in tensor.name] == [
        numel for name, numel in trained.items() if "trainable_tokens" in name
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['tuner.new_tokens=["<a>","<b>","<a>"]'], "<a> is there twice"),
        (['tuner.new_tokens=["<a>"," "]'], "' ' is no token"),
        (["tuner=freeze", 'tuner.new_tokens=["<a>"]'], "needs tuner=lora or tuner=full"),
        (['tuner.new_tokens=["<a>"]', "tuner.adapter_path=some/folder"], "merge it with"),
    ],
)
def test_impossible_values_are_found_before_anything(overrides: list[str], message: str) -> None:
    (problem,) = find_problems(compose_config(["model=tiny", *overrides]).config)
    assert "tuner.new_tokens=" in problem
    assert message in problem

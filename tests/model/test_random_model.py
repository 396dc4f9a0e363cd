"""Random encoders: a whole folder of the base model, with a tokenizer of its kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from llmtune.config.compose import compose_config
from llmtune.model.random_model import makes_encoder, write_random_model
from llmtune.model.source import resolve_model_folder
from llmtune.storage.hashing import sha256_bytes

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def made(model: str, cache: Path) -> Path:
    config = compose_config([f"model={model}", "data.train=rows.jsonl"]).config
    return resolve_model_folder(config.model, cache)


@pytest.mark.parametrize(
    ("model", "pair", "special", "types"),
    [
        (
            "tiny_bert",
            ["[CLS]", "[SEP]", "[SEP]"],
            {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4},
            [0, 1],
        ),
        (
            "tiny_roberta",
            ["<s>", "</s>", "</s>", "</s>"],
            {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4},
            None,
        ),
    ],
)
def test_a_pair_has_the_special_tokens_of_its_kind(
    model: str,
    pair: list[str],
    special: dict[str, int],
    types: list[int] | None,
    tmp_path: Path,
) -> None:
    folder = made(model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in special} == special
    encoded = tokenizer("Return a list", "of the items")
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert [token for token in tokens if token in special] == pair
    assert tokenizer.is_fast
    assert tokenizer.model_max_length == 512
    found = encoded.get("token_type_ids")
    assert (sorted(set(found)) if found is not None else None) == types

    model_there: Any = AutoModelForMaskedLM.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(model_there).__name__]
    assert config["pad_token_id"] == tokenizer.pad_token_id
    logits = model_there(**tokenizer(["a row", "of"], padding=True, return_tensors="pt")).logits
    assert torch.isfinite(logits).all()


def test_the_longest_row_has_positions(tmp_path: Path) -> None:
    for name in ("tiny_bert", "tiny_roberta"):
        folder = made(name, tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        row = tokenizer("a " * 2000, truncation=True, return_tensors="pt")
        assert row["input_ids"].shape == (1, 512)
        AutoModelForMaskedLM.from_pretrained(folder)(**row)


def test_the_same_settings_make_the_same_files(tmp_path: Path) -> None:
    first, second = made("tiny_bert", tmp_path / "a"), made("tiny_bert", tmp_path / "b")
    assert first.name == second.name
    for file in sorted(first.iterdir()):
        assert sha256_bytes(file.read_bytes()) == sha256_bytes((second / file.name).read_bytes())


@pytest.mark.parametrize(
    ("settings", "encoder"),
    [
        ({"model_type": "bert"}, True),
        ({"model_type": "bert", "is_decoder": True}, False),
        ({"model_type": "modernbert"}, True),
        ({"model_type": "deberta-v2"}, True),
        ({"model_type": "llama"}, False),
        ({"model_type": "bart"}, False),
        ({"model_type": "modernbert-decoder"}, False),
    ],
)
def test_encoders_are_told_from_decoders(settings: dict[str, Any], encoder: bool) -> None:
    assert makes_encoder(settings) is encoder


@pytest.mark.parametrize("kind", ["modernbert", "deberta-v2", "electra", "xlm-roberta"])
def test_other_encoders_take_what_their_tokenizer_gives(kind: str, tmp_path: Path) -> None:
    write_random_model({"model_type": kind, **SMALL}, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    row = tokenizer("a list", "of items", return_tensors="pt")
    logits = AutoModelForMaskedLM.from_pretrained(tmp_path)(**row).logits
    assert logits.shape == (*row["input_ids"].shape, 300)

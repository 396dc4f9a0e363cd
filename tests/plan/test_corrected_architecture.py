"""BERT is told from RoBERTa by weights and tokenizer where ``config.json`` is silent or wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from llmtune.config.compose import compose_config
from llmtune.config.groups.model import ModelConfig
from llmtune.errors import ConfigError
from llmtune.model.source import resolve_model_folder
from llmtune.model.task_folder import resolve_task_folder
from llmtune.model.tokenizer import load_tokenizer
from llmtune.model.weights.files import read_entries
from llmtune.model.weights.names import find_missing, match_names
from llmtune.plan.architecture.corrected_architecture import (
    correct_architecture,
    describe_correction,
)
from llmtune.plan.architecture.load import load_architecture
from llmtune.plan.architecture.meta_model import build_meta_model
from llmtune.plan.resolve import resolve_ladder
from llmtune.task.labels import LabelKind, Labels

NUMBERS: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
OF_KIND: dict[str, dict[str, Any]] = {
    "bert": {"max_position_embeddings": 64, "type_vocab_size": 2, "pad_token_id": 0},
    "roberta": {"max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1},
}


def save(folder: Path, kind: str, bare: bool = False, padding: int = 0, **changes: Any) -> Path:
    """A folder of an architecture with a WordPiece vocabulary.

    Args:
        bare: The base model alone, whose names have no prefix.
        padding: Number of ``[PAD]``.
        changes: Keys of ``config.json``; None removes one.
    """
    config = AutoConfig.for_model(kind, **NUMBERS, **OF_KIND[kind])
    model_class: Any = AutoModel if bare else AutoModelForMaskedLM
    model_class.from_config(config).save_pretrained(folder)
    words = [f"w{number}" for number in range(64)]
    words[padding] = "[PAD]"
    words[-4:] = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    stored = {**json.loads((folder / "config.json").read_text()), **changes}
    stored = {key: value for key, value in stored.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(stored))
    return folder


@pytest.mark.parametrize("bare", [False, True])
def test_a_bert_without_model_type_in_a_folder_named_roberta_is_bert(
    bare: bool, tmp_path: Path
) -> None:
    folder = save(tmp_path / "chinese-roberta-wwm-ext", "bert", bare=bare, model_type=None)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert correct_architecture(folder) == {
        "model_type": "bert",
        "architectures": ["BertModel" if bare else "BertForMaskedLM"],
    }
    assert describe_correction(folder) == (
        f"{folder} is read as bert, by its weights and its tokenizer; its config.json names no"
        " model_type"
    )
    assert load_architecture(ModelConfig(name_or_path=str(folder))).model_type == "bert"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("bare", [False, True])
def test_a_bert_that_says_roberta_is_corrected_with_what_its_tables_hold(
    bare: bool, tmp_path: Path
) -> None:
    folder = save(
        tmp_path / "model",
        "bert",
        bare=bare,
        model_type="roberta",
        architectures=["RobertaForMaskedLM"],
        type_vocab_size=1,
        pad_token_id=1,
    )
    assert correct_architecture(folder) == {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "type_vocab_size": 2,
        "pad_token_id": 0,
    }
    # All weights of the classifier but its head are in the files.
    architecture = load_architecture(ModelConfig(name_or_path=str(folder)))
    model, _ = build_meta_model(architecture, model_class="AutoModelForSequenceClassification")
    matching = match_names(model, read_entries(folder))
    missing, _ = find_missing(model, set(matching.direct))
    drawn = {"classifier.weight", "classifier.bias"}
    assert {name for name in missing if not name.startswith("bert.pooler")} == drawn


@pytest.mark.parametrize("bare", [False, True])
def test_a_roberta_is_left_alone_even_with_a_wordpiece_vocabulary(
    bare: bool, tmp_path: Path
) -> None:
    assert correct_architecture(save(tmp_path / "m", "roberta", bare=bare, padding=1)) == {}
    assert describe_correction(tmp_path / "m") is None
    (tmp_path / "m/vocab.txt").unlink()
    assert correct_architecture(tmp_path / "m") == {}


def test_a_roberta_that_says_bert_is_corrected_by_its_names(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", "roberta", padding=1, model_type="bert")
    assert correct_architecture(folder)["model_type"] == "roberta"


def test_an_old_bert_is_left_alone_and_its_names_are_understood(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", "bert")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file, metadata={"format": "pt"})
    assert correct_architecture(folder) == {}
    model, _ = build_meta_model(
        AutoConfig.from_pretrained(folder), model_class="AutoModelForTokenClassification"
    )
    matching = match_names(model, read_entries(folder))
    assert find_missing(model, set(matching.direct))[0] == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "llama"}'])
def test_what_is_no_bert_needs_no_correction(text: str, tmp_path: Path) -> None:
    assert correct_architecture(tmp_path) == {}
    (tmp_path / "config.json").write_text(text)
    assert correct_architecture(tmp_path) == {}


def test_a_tokenizer_file_tells_it_too(tmp_path: Path) -> None:
    folder = save(tmp_path / "roberta", "bert", bare=True, model_type=None)
    (folder / "vocab.txt").unlink()
    tokenizer = {"model": {"type": "WordPiece", "vocab": {"[PAD]": 0, "a": 1}}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert correct_architecture(folder)["model_type"] == "bert"
    tokenizer["model"]["type"] = "BPE"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert correct_architecture(folder) == {}


def test_the_plan_says_it_and_a_named_architecture_is_compared_with_the_right_one(
    tmp_path: Path,
) -> None:
    folder = save(tmp_path / "roberta-wwm", "bert", model_type="roberta")
    job = [f"model.name_or_path={folder}", "data.train=a.jsonl", "data.max_seq_length=64"]
    ladder = resolve_ladder(
        compose_config([*job, "model.task=sequence_classification"]).config, planning=True
    )
    assert ladder.shape.kind == "bert"
    assert ladder.refusals == ()
    assert [note for note in ladder.notes if "is read as bert" in note]
    named = ModelConfig(name_or_path=str(folder), config={"model_type": "bert", **NUMBERS})
    assert resolve_model_folder(named, tmp_path / "cache") == folder
    named = ModelConfig(name_or_path=str(folder), config={"model_type": "roberta", **NUMBERS})
    with pytest.raises(ConfigError, match="model_type: model.config says roberta"):
        resolve_model_folder(named, tmp_path / "cache")


def test_a_task_folder_has_the_right_architecture(tmp_path: Path) -> None:
    base = save(tmp_path / "roberta", "bert", model_type="roberta", pad_token_id=1)
    tokenizer = load_tokenizer(base, ModelConfig(name_or_path=str(base)))
    assert tokenizer.pad_token_id == 0
    folder = resolve_task_folder(
        base,
        ModelConfig(name_or_path=str(base), task="sequence_classification"),
        Labels(kind=LabelKind.name, names=("a", "b", "c")),
        tokenizer,
        0,
        tmp_path / "cache",
        lambda _: None,
    )
    assert correct_architecture(folder) == {}
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(model).__name__ == "BertForSequenceClassification"
    stored = load_file(base / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(model.state_dict()[name], stored[name])


def test_the_model_of_a_corrected_folder_is_the_one_that_was_saved(tmp_path: Path) -> None:
    folder = save(tmp_path / "roberta", "bert", model_type=None)
    named = ModelConfig(name_or_path=str(folder))
    model = AutoModelForMaskedLM.from_pretrained(folder, config=load_architecture(named)).eval()
    stored = load_file(folder / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(model.state_dict()[name], stored[name])

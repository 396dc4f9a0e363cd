"""A model folder with the head of a task: the base's files, and a head that is drawn once."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from llmtune.config.groups.model import ModelConfig
from llmtune.errors import ConfigError, MissingPrerequisiteError
from llmtune.model.task_folder import read_labels, resolve_task_folder
from llmtune.security.trust import find_objection
from llmtune.task.labels import LabelKind, Labels

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"intermediate_size": 32},
    "roberta": {"intermediate_size": 32, "pad_token_id": 1},
    "distilbert": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2},
    "electra": {"intermediate_size": 32, "embedding_size": 16},
    "deberta-v2": {"intermediate_size": 32},
    "modernbert": {"intermediate_size": 32, "pad_token_id": 0, "cls_token_id": 1},
    "xlm-roberta": {"intermediate_size": 32, "pad_token_id": 1},
    "llama": {"intermediate_size": 32},
    "qwen2": {"intermediate_size": 32},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
}
CLASSES = Labels(kind=LabelKind.name, names=("a", "b", "c"))
TASKS = {
    "sequence_classification": CLASSES,
    "regression": Labels(kind=LabelKind.value, names=("value",)),
    "token_classification": Labels(kind=LabelKind.tags, names=("O", "B-X", "I-X")),
}


class Tokenizer:
    """What is asked of a tokenizer."""

    pad_token_id = 1


def save_base(family: str, folder: Path, headless: bool = False) -> Path:
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    decodes = family in ("llama", "qwen2", "gpt2")
    kind = "AutoModelForCausalLM" if decodes else "AutoModelForMaskedLM"
    torch.manual_seed(0)
    model = getattr(transformers, "AutoModel" if headless else kind).from_config(config)
    model.save_pretrained(folder)
    return folder


def make(base: Path, labels: Labels, cache: Path, **settings: Any) -> Path:
    config = ModelConfig(name_or_path=str(base), **settings)
    return resolve_task_folder(base, config, labels, Tokenizer(), 3, cache, lambda _: None)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_it_whole_with_the_weights_of_the_base(
    family: str, headless: bool, task: str, tmp_path: Path
) -> None:
    base = save_base(family, tmp_path / "base", headless)
    labels = TASKS[task]
    folder = make(base, labels, tmp_path, task=task)
    kind = "TokenClassification" if task == "token_classification" else "SequenceClassification"
    loaded: Any = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
        folder, output_loading_info=True
    )
    model, info = loaded
    assert not info["missing_keys"], info
    assert not info["mismatched_keys"], info
    assert tuple(model.config.id2label[n] for n in range(len(labels.names))) == labels.names
    assert model.config.pad_token_id == 1
    assert read_labels(folder) == (task, labels)

    # The body is the base's, the head is no zeros, and a second draw gives the same.
    plain = transformers.AutoModel.from_pretrained(base).state_dict()
    body = getattr(model, model.base_model_prefix).state_dict()
    shared = [name for name in body if name in plain and ".pooler" not in f".{name}"]
    assert len(shared) > 10
    assert all(torch.equal(body[name], plain[name]) for name in shared)
    again = make(base, labels, tmp_path / "elsewhere", task=task)
    one, other = load_file(folder / "head.safetensors"), load_file(again / "head.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(tensor.abs().sum() > 0 for tensor in one.values())


def test_language_models_and_finished_classifiers_are_taken_as_they_are(tmp_path: Path) -> None:
    base = save_base("bert", tmp_path / "base")
    assert make(base, Labels(), tmp_path) == base
    folder = make(base, CLASSES, tmp_path, task="sequence_classification")
    assert make(folder, CLASSES, tmp_path, task="sequence_classification") == folder


def test_a_head_for_other_classes_is_refused_or_replaced(tmp_path: Path) -> None:
    base = save_base("roberta", tmp_path / "base")
    task = {"task": "sequence_classification"}
    first = make(base, CLASSES, tmp_path, **task)
    other = Labels(kind=LabelKind.name, names=("a", "d"))
    with pytest.raises(ConfigError, match=r"a head for a, b, c, which has no d; .*new_head=true"):
        make(first, other, tmp_path, **task)
    second = make(first, other, tmp_path, new_head=True, **task)
    loaded: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        second, output_loading_info=True
    )
    model, info = loaded
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert model.config.num_labels == 2
    assert read_labels(second)[1] == other


def test_a_head_without_names_takes_those_of_the_rows(tmp_path: Path) -> None:
    base = save_base("bert", tmp_path / "base")
    folder = make(base, CLASSES, tmp_path, task="sequence_classification")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(n): f"LABEL_{n}" for n in range(3)}
    config["label2id"] = {f"LABEL_{n}": n for n in range(3)}
    (folder / "config.json").write_text(json.dumps(config))
    renamed = make(folder, CLASSES, tmp_path, task="sequence_classification")
    assert renamed != folder
    model = transformers.AutoModelForSequenceClassification.from_pretrained(renamed)
    before = load_file(folder / "head.safetensors")["classifier.weight"]
    assert torch.equal(model.classifier.weight, before), "the head itself stays"


def test_files_that_lack_more_than_the_head_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base = save_base("bert", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    del weights["bert.encoder.layer.1.attention.self.query.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingPrerequisiteError, match=r"one weight of the model is in none of"):
        make(base, CLASSES, tmp_path, task="sequence_classification")
    assert not [path for path in (tmp_path / "models").iterdir() if path.suffix != ".lock"]


def test_an_architecture_without_such_a_head_is_refused(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(
        "mamba", hidden_size=16, num_hidden_layers=1, vocab_size=64, state_size=4
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"no sequence classification for its architecture"):
        make(tmp_path / "base", CLASSES, tmp_path, task="sequence_classification")


@pytest.mark.parametrize("reason", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_a_base_that_cannot_be_linked_is_copied(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another file system, or somebody else's: an export takes no link out of a folder."""
    base = save_base("bert", tmp_path / "base")
    linked = make(base, CLASSES, tmp_path / "linked")

    def refuse(*_: Any) -> None:
        raise OSError(reason, "no link")

    monkeypatch.setattr(os, "link", refuse)
    said: list[str] = []
    config = ModelConfig(name_or_path=str(base))
    cache = tmp_path / "copied"
    copied = resolve_task_folder(base, config, CLASSES, Tokenizer(), 3, cache, said.append)
    assert {file.name for file in copied.iterdir()} == {file.name for file in linked.iterdir()}
    for file in copied.iterdir():
        assert find_objection(file, None) is None
        assert file.read_bytes() == (linked / file.name).read_bytes()
    assert any("cannot be linked" in text and "paths.cache_dir" in text for text in said)

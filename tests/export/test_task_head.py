"""Adapters that bring a head: a base of words, or of states, becomes a model of classes, and
computes what peft computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaConfig, RobertaConfig

from llmtune.config.groups.export import ExportConfig, ExportDtype
from llmtune.errors import ExportError
from llmtune.export.pipeline import run_export
from llmtune.export.request import ExportRequest
from tests.export.conftest import TOKENS, copy_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
BERT, ROBERTA = BertConfig(**SIZES), RobertaConfig(**SIZES, pad_token_id=1, type_vocab_size=1)
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=2)

#: Name -> class of the base, its configuration, class of the adapted model, task, labels, targets.
KINDS: dict[str, tuple[str, Any, str, str, int, list[str]]] = {
    "words to classes": (
        "RobertaForMaskedLM",
        ROBERTA,
        "RobertaForSequenceClassification",
        "SEQ_CLS",
        3,
        ["query", "value"],
    ),
    "states to classes": (
        "BertModel",
        BERT,
        "BertForSequenceClassification",
        "SEQ_CLS",
        4,
        ["query", "dense"],
    ),
    "one number": ("BertModel", BERT, "BertForSequenceClassification", "SEQ_CLS", 1, ["query"]),
    "classes of tokens": (
        "BertForMaskedLM",
        BERT,
        "BertForTokenClassification",
        "TOKEN_CLS",
        5,
        ["value"],
    ),
    "answers": ("BertModel", BERT, "BertForQuestionAnswering", "QUESTION_ANS", 2, ["value"]),
    "decoder to classes": (
        "LlamaForCausalLM",
        LLAMA,
        "LlamaForSequenceClassification",
        "SEQ_CLS",
        3,
        ["q_proj", "up_proj"],
    ),
    "adapted embedding": (
        "LlamaForCausalLM",
        LLAMA,
        "LlamaForSequenceClassification",
        "SEQ_CLS",
        2,
        ["embed_tokens", "v_proj"],
    ),
    "other classes": (
        "RobertaForSequenceClassification",
        ROBERTA,
        "RobertaForSequenceClassification",
        "SEQ_CLS",
        3,
        ["query"],
    ),
    "the base's own classes": (
        "RobertaForSequenceClassification",
        ROBERTA,
        "RobertaForSequenceClassification",
        "SEQ_CLS",
        2,
        ["query"],
    ),
}

HUB_TASKS = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
}
TASK_LOADERS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def make_pair(
    kind: str, folder: Path, tokenizer: Path, dtype: torch.dtype = torch.float32
) -> tuple[Path, Path, Any]:
    """A base, an adapter with a head, and both of them in peft."""
    architecture, config, headed, task, labels, targets = KINDS[kind]
    torch.manual_seed(0)
    getattr(transformers, architecture)(config).to(dtype).save_pretrained(folder / "base")
    copy_tokenizer(tokenizer, folder / "base")
    model = getattr(transformers, headed).from_pretrained(
        folder / "base", num_labels=labels, ignore_mismatched_sizes=True, dtype=dtype
    )
    wrapped = get_peft_model(
        model, LoraConfig(task_type=task, r=4, lora_alpha=16, target_modules=targets)
    )
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    wrapped.save_pretrained(str(folder / "adapter"))
    return folder / "base", folder / "adapter", wrapped.eval()


def export(base: Path, adapter: Path, output: Path, **settings: Any) -> Path:
    return run_export(
        ExportRequest(base=base, base_name="tiny", adapter=adapter, run=None, output=output),
        ExportConfig(**settings),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_head_becomes_part_of_the_model(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    base, adapter, wrapped = make_pair(kind, tmp_path, tiny_model)
    said: list[str] = []
    request = ExportRequest(
        base=base,
        base_name="tiny",
        adapter=adapter,
        run=None,
        output=tmp_path / "out",
        say=said.append,
    )
    folder = run_export(request, ExportConfig())
    assert any(line.startswith("parity: ") for line in said)
    _, _, headed, _, labels, _ = KINDS[kind]
    merged, report = getattr(transformers, headed).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert merged.config.architectures == [headed]
    assert merged.config.num_labels == labels
    with torch.no_grad():
        assert torch.allclose(merged.eval()(TOKENS)[0], wrapped(TOKENS)[0], atol=2e-5)
    card = (folder / "README.md").read_text()
    assert f"pipeline_tag: {HUB_TASKS[KINDS[kind][3]]}" in card
    assert f"import {TASK_LOADERS[KINDS[kind][3]]}, AutoTokenizer" in card
    assert not (folder / "generation_config.json").exists()


def test_names_of_classes_are_the_bases_where_it_has_as_many(
    tiny_model: Path, tmp_path: Path
) -> None:
    base, adapter, _ = make_pair("words to classes", tmp_path, tiny_model)
    file = base / "config.json"
    named = {
        "id2label": {"0": "bad", "1": "fair", "2": "good"},
        "label2id": {"bad": 0, "fair": 1, "good": 2},
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    found = json.loads((export(base, adapter, tmp_path / "a") / "config.json").read_text())
    assert found["id2label"] == named["id2label"]
    base, adapter, _ = make_pair("states to classes", tmp_path / "other", tiny_model)
    found = json.loads((export(base, adapter, tmp_path / "b") / "config.json").read_text())
    assert found["id2label"] == {str(number): f"LABEL_{number}" for number in range(4)}


def test_the_head_takes_the_bases_dtype(tiny_model: Path, tmp_path: Path) -> None:
    base, adapter, _ = make_pair("decoder to classes", tmp_path, tiny_model, torch.bfloat16)
    tensors = load_file(export(base, adapter, tmp_path / "out") / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in tensors
    whole = load_file(
        export(base, adapter, tmp_path / "whole", dtype=ExportDtype.fp32) / "model.safetensors"
    )
    head = load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(whole["score.weight"], head.float())


def test_a_head_goes_into_other_formats(tiny_model: Path, tmp_path: Path) -> None:
    base, adapter, wrapped = make_pair("words to classes", tmp_path, tiny_model)
    folder = export(base, adapter, tmp_path / "graph", format="torchscript")
    graph = torch.jit.load(folder / "model.ts.pt")
    with torch.no_grad():
        assert torch.allclose(
            graph(TOKENS, torch.ones_like(TOKENS)), wrapped(TOKENS).logits, atol=1e-4
        )
    with pytest.raises(ExportError, match="RobertaForSequenceClassification"):
        export(base, adapter, tmp_path / "gguf", format="gguf")
    assert not (tmp_path / "gguf").exists()


def change_head(change: Callable[[dict[str, torch.Tensor]], None], adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_what_no_head_has_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    base, adapter, _ = make_pair("words to classes", tmp_path, tiny_model)
    name = "base_model.model.classifier.dense.weight"
    change_head(lambda tensors: tensors.update({name: torch.zeros(7, 48)}), adapter)
    with pytest.raises(
        ExportError, match=r"its head \(.*dense.weight \(7, 48\).*does not fit RobertaForSequence"
    ):
        export(base, adapter, tmp_path / "out")

    def without_classifier(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "classifier" in key]:
            del tensors[key]

    change_head(without_classifier, adapter)
    with pytest.raises(ExportError, match="classifier among modules_to_save, and no tensor of it"):
        export(base, adapter, tmp_path / "out")
    _, again, _ = make_pair("words to classes", tmp_path / "again", tiny_model)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "vits"}))
    with pytest.raises(ExportError, match="no text-classification for model_type vits"):
        export(base, again, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_part_that_is_stored_nowhere_is_named(tiny_model: Path, tmp_path: Path) -> None:
    """BERT's classes look at the pooler, which a model of words lacks and peft does not store: it
    would be random.
    """
    KINDS["no pooler"] = (
        "BertForMaskedLM",
        BERT,
        "BertForSequenceClassification",
        "SEQ_CLS",
        3,
        ["query"],
    )
    try:
        base, adapter, _ = make_pair("no pooler", tmp_path, tiny_model)
    finally:
        del KINDS["no pooler"]
    with pytest.raises(ExportError, match=r"bert\.pooler\.dense\.weight is missing"):
        export(base, adapter, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))

"""``predict`` and ``eval`` of runs that were trained here: a whole model, and an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmtune.cli.main import main
from tests.predict.models import make_bert_tokenizer, read_rows, sentence, write_rows
from tests.support import first

pytestmark = pytest.mark.process

ROWS = [
    {
        "text": f"{sentence(number, 2 + number % 5)} {('blue', 'red')[number % 2]}",
        "label": ("even", "odd")[number % 2],
    }
    for number in range(48)
]


@pytest.fixture(scope="module", params=first(1, ["lora", "full"]))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that has seen a few rows."""
    folder = tmp_path_factory.mktemp(f"run-{request.param}")
    tokenizer = make_bert_tokenizer(folder / "base")
    torch.manual_seed(5)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    transformers.BertModel(config).save_pretrained(folder / "base")
    rows = write_rows(folder / "rows.jsonl", ROWS)
    command = [
        *(f"model.name_or_path={folder / 'base'}", f"data.train={rows}", "data=classification"),
        *(f"tuner={request.param}", "data.max_seq_length=16", "data.val_set_size=8"),
        *("precision=fp32", "train.max_steps=3", "optim.learning_rate=0.001", "launch.nproc=1"),
    ]
    assert main([*command, f"output_dir={folder / 'run'}"]) == 0
    return folder / "run"


def find_whole_model(run: Path) -> Path:
    """A folder that plain transformers loads."""
    return next(folder for name in ("merged", "model") if (folder := run / name).is_dir())


def test_a_run_predicts_what_transformers_says_of_its_model(run: Path, tmp_path: Path) -> None:
    more = [{"text": sentence(3, 40)}]
    rows = write_rows(tmp_path / "in.jsonl", [*ROWS, *more])
    out = tmp_path / "out.jsonl"
    command = ["predict", f"run={run}", f"predict.input={rows}", f"predict.output={out}"]
    assert main(command) == 0
    merged = find_whole_model(run)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(merged).eval()
    for given, row in zip([*ROWS, *more], read_rows(out), strict=True):
        encoded = tokenizer(given["text"], truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            shares = model(**encoded).logits[0].softmax(-1)
        names = model.config.id2label
        assert row["prediction"] == names[int(shares.argmax())]
        expected = {names[number]: float(share) for number, share in enumerate(shares)}
        assert row["scores"] == pytest.approx(expected, abs=1e-5)
        assert row["text"] == given["text"]


def test_eval_agrees_and_refuses_labels_that_the_model_does_not_know(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = [{**row, "text": f"house {row['text']}"} for row in ROWS]
    held = write_rows(tmp_path / "held.jsonl", others[:20])
    out = tmp_path / "out.jsonl"
    assert main(["predict", f"run={run}", f"predict.input={held}", f"predict.output={out}"]) == 0
    right = [row["prediction"] == row["label"] for row in read_rows(out)]
    capsys.readouterr()
    assert main(["eval", f"run={run}", f"data.eval={held}", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["eval_accuracy"] == pytest.approx(sum(right) / 20)
    assert {"eval_f1", "eval_precision", "eval_recall", "eval_matthews", "eval_loss"} <= set(found)

    wrong = write_rows(tmp_path / "wrong.jsonl", [*others[:5], {"text": "a", "label": "third"}])
    assert main(["eval", f"run={run}", f"data.eval={wrong}"]) == 4
    error = capsys.readouterr().err
    assert f"{wrong}:6: " in error
    assert "'third'" in error
    base = ["eval", f"base={find_whole_model(run)}", "data.max_seq_length=16"]
    train = write_rows(tmp_path / "train.jsonl", [*ROWS, {"text": "b", "label": "third"}])
    assert main([*base, f"data.train={train}", f"data.eval={wrong}", "precision=fp32"]) == 4
    error = capsys.readouterr().err
    assert f"{wrong}:6: the model knows no class 'third', only even, odd" in error

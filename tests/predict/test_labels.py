"""``predict`` of every task that has labels says what plain transformers says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmtune.cli.main import main
from tests.predict.models import WORDS, make_bert, read_rows, sentence, write_rows

#: Kind of head, names, problem.
HEADS = {
    "classes": ("Sequence", ["neg", "pos", "none"], "single_label_classification"),
    "sets": ("Sequence", ["a", "b", "c", "d"], "multi_label_classification"),
    "number": ("Sequence", ["value"], "regression"),
    "numbers": ("Sequence", ["x", "y"], "regression"),
    "tags": ("Token", ["O", "B-X", "I-X"], None),
}


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("heads")
    found = {}
    for name, (kind, names, problem) in HEADS.items():
        settings = {"problem_type": problem} if problem else {}
        found[name] = make_bert(folder / name, kind, names, **settings)
    found["decoder"] = make_decoder(tiny_model, folder / "decoder")
    return found


def make_decoder(base: Path, folder: Path) -> Path:
    """A Llama with a head, whose configuration names no padding token."""
    torch.manual_seed(4)
    config = transformers.AutoConfig.from_pretrained(
        base, num_labels=3, id2label=dict(enumerate(HEADS["classes"][1])), pad_token_id=None
    )
    config.initializer_range = 0.3
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def predict(model: Path, rows: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    command = ["predict", f"base={model}", f"predict.input={rows}", f"predict.output={out}"]
    same = ["precision=fp32", "data.max_seq_length=48", "data.overlong=truncate"]
    assert main([*command, *same, *more]) == 0
    return read_rows(out)


def plain_logits(model: Path, *texts: Any, **settings: Any) -> torch.Tensor:
    """The logits of transformers for one row by itself."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    architecture = json.loads((model / "config.json").read_text())["architectures"][0]
    loaded = getattr(transformers, architecture).from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        encoded = tokenizer(*texts, return_tensors="pt", truncation=True, max_length=48, **settings)
        logits: torch.Tensor = loaded(**encoded).logits[0]
    return logits


@pytest.mark.parametrize("name", ["classes", "sets", "number", "numbers", "decoder"])
def test_texts_and_pairs_get_what_transformers_gives_them(
    name: str, heads: dict[str, Path], tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [
        {"sentence1": sentence(n, 1 + n % 9), "sentence2": sentence(n + 1, 1 + n % 4), "id": n}
        for n in range(37)
    ]
    for n in range(0, 37, 3):
        del rows[n]["sentence2"]
    found = predict(heads[name], write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert [row["row"] for row in found] == list(range(37))
    _, names, _ = HEADS["classes" if name == "decoder" else name]
    for given, row in zip(rows, found, strict=True):
        assert {key: row[key] for key in given} == given
        texts = [given[key] for key in ("sentence1", "sentence2") if key in given]
        logits = plain_logits(heads[name], *texts)
        if name in ("classes", "decoder"):
            assert row["prediction"] == names[int(logits.argmax())]
            shares = dict(zip(names, logits.softmax(-1).tolist(), strict=True))
        elif name == "sets":
            assert row["prediction"] == [n for n, one in zip(names, logits, strict=True) if one > 0]
            shares = dict(zip(names, logits.sigmoid().tolist(), strict=True))
        else:
            expected = logits.tolist()
            assert row["prediction"] == pytest.approx(
                expected[0] if name == "number" else expected, abs=1e-5
            )
            assert "scores" not in row
            continue
        assert row["scores"] == pytest.approx(shares, abs=2e-6)
        assert list(row["scores"].values()) == sorted(row["scores"].values(), reverse=True)


def test_words_get_the_tags_of_their_first_pieces(heads: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        {"tokens": ["abc", *sentence(n, n % 7).split(), "xyz"], "tags": ["?"] * 2, "n": n}
        for n in range(20)
    ]
    rows.append({"tokens": ["abcdefgh"] * 12, "tags": [], "n": 20})
    found = predict(
        heads["tags"],
        write_rows(tmp_path / "in.jsonl", rows),
        tmp_path / "out.jsonl",
        "data.overlong=truncate",
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(heads["tags"])
    for given, row in zip(rows, found, strict=True):
        words: Any = given["tokens"]
        logits = plain_logits(heads["tags"], words, is_split_into_words=True)
        of_words = tokenizer(
            words, is_split_into_words=True, truncation=True, max_length=48
        ).word_ids()
        for word in range(len(words)):
            if word not in of_words:
                assert (row["prediction"][word], row["scores"][word]) == (None, None)
                continue
            share, tag = logits[of_words.index(word)].softmax(-1).max(-1)
            assert row["prediction"][word] == ["O", "B-X", "I-X"][int(tag)]
            assert row["scores"][word] == pytest.approx(float(share), abs=2e-6)
    assert len(found[20]["prediction"]) == 12
    assert found[20]["prediction"][-1] is None


def test_a_row_that_is_too_long_is_cut_or_left_out_as_in_training(
    heads: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [sentence(1, 5), sentence(2, 60), sentence(3, 47)]
    rows = write_rows(tmp_path / "in.jsonl", [{"text": text, "label": "?"} for text in texts])
    cut = predict(heads["classes"], rows, tmp_path / "cut.jsonl", "data.overlong=truncate")
    assert "2 rows were cut to data.max_seq_length" in capsys.readouterr().out
    for text, row in zip(texts, cut, strict=True):
        shares = plain_logits(heads["classes"], text).softmax(-1).tolist()
        assert row["scores"] == pytest.approx(
            dict(zip(["neg", "pos", "none"], shares, strict=True)), abs=2e-6
        )
    left = predict(heads["classes"], rows, tmp_path / "left.jsonl", "data.overlong=drop")
    # Alone, and beside longer rows: some processors add up in another order.
    assert left[0]["scores"] == pytest.approx(cut[0]["scores"], abs=2e-6)
    assert [row["prediction"] for row in left[1:]] == [None, None]
    assert "62 tokens, more than data.max_seq_length=48" in left[1]["error"]
    assert "have no prediction" in capsys.readouterr().out


def test_top_k_keeps_the_most_probable_classes(heads: dict[str, Path], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"text": word} for word in WORDS])
    whole = predict(heads["classes"], rows, tmp_path / "all.jsonl")
    top = predict(heads["classes"], rows, tmp_path / "top.jsonl", "predict.top_k=1")
    for one, other in zip(whole, top, strict=True):
        assert other["scores"] == {one["prediction"]: max(one["scores"].values())}


def test_a_classifier_refuses_rows_of_another_kind(
    heads: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    out = tmp_path / "out.jsonl"
    command = ["predict", f"base={heads['classes']}", f"predict.output={out}"]
    assert main([*command, f"predict.input={rows}", "data.max_seq_length=48"]) == 4
    error = capsys.readouterr().err
    assert f"{rows}:1: the model needs a field sentence1 or text" in error
    assert not out.exists()


def test_columns_are_named_as_for_training(heads: dict[str, Path], tmp_path: Path) -> None:
    rows = tmp_path / "in.csv"
    rows.write_text("review,stars\nthe cat,1\na dog,2\n")
    source = f"{{path: {rows}, fields: {{text: review, label: missing}}}}"
    out = tmp_path / "out.jsonl"
    command = ["predict", f"base={heads['classes']}", f"predict.input={source}"]
    assert main([*command, f"predict.output={out}", "data.max_seq_length=48"]) == 0
    assert [(row["review"], row["stars"], row["row"]) for row in read_rows(out)] == [
        ("the cat", "1", 0),
        ("a dog", "2", 1),
    ]

"""Rows on disk: split, counted, cached by content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmtune.config.schema import DataConfig, Overlong
from llmtune.data.prepare import PreparedData, open_rows, prepare_data, read_samples
from llmtune.errors import DataError


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def write(path: Path, count: int, words: int = 3) -> Path:
    rows = [{"instruction": f"question {n}", "output": "word " * words + str(n)} for n in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def prepare(tokenizer: Any, cache: Path, **values: Any) -> PreparedData:
    return prepare_data(DataConfig(**{"max_seq_length": 128, **values}), tokenizer, 42, cache)


def test_the_split_is_drawn_once_and_disjoint(tokenizer: Any, tmp_path: Path) -> None:
    source = str(write(tmp_path / "a.jsonl", 40))
    data = prepare(tokenizer, tmp_path, train=source, val_set_size=0.25)
    assert data.eval is not None
    assert (data.train.rows, data.eval.rows) == (30, 10)
    train = {tuple(row["input_ids"]) for row in open_rows(data, "train")}
    held_out = {tuple(row["input_ids"]) for row in open_rows(data, "eval")}
    assert len(train | held_out) == 40
    assert len(read_samples(data)) == 3


def test_counts_are_those_of_the_rows(tokenizer: Any, tmp_path: Path) -> None:
    data = prepare(tokenizer, tmp_path, train=str(write(tmp_path / "a.jsonl", 10)), val_set_size=0)
    rows = open_rows(data, "train")
    assert data.eval is None
    assert data.train.tokens == sum(len(row["input_ids"]) for row in rows)
    assert data.train.trained_tokens == sum(sum(row["mask"]) for row in rows)
    assert read_samples(data) == []


def test_the_cache_knows_the_content(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 10)
    first = prepare(tokenizer, tmp_path, train=str(path), val_set_size=2)
    again = prepare(tokenizer, tmp_path, train=str(path), val_set_size=2)
    assert first == again
    write(path, 11)
    assert prepare(tokenizer, tmp_path, train=str(path), val_set_size=2).fingerprint != first.fingerprint
    assert prepare(tokenizer, tmp_path, train=str(path), val_set_size=3).fingerprint != first.fingerprint


def test_own_evaluation_files_are_used_whole(tokenizer: Any, tmp_path: Path) -> None:
    train, held_out = write(tmp_path / "a.jsonl", 10), write(tmp_path / "b.jsonl", 4, words=9)
    data = prepare(tokenizer, tmp_path, train=[str(train), str(train)], eval=str(held_out))
    assert data.eval is not None
    assert (data.train.rows, data.eval.rows) == (20, 4)


def test_dropped_rows_are_counted_and_none_left_is_an_error(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"instruction": "q", "output": "word " * n} for n in (2, 300)]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = prepare(tokenizer, tmp_path, train=str(path), val_set_size=0)
    assert (data.train.rows, data.train.dropped) == (1, 1)
    data = prepare(tokenizer, tmp_path, train=str(path), val_set_size=0, overlong=Overlong.truncate)
    assert (data.train.rows, data.train.truncated) == (2, 1)
    path.write_text(json.dumps(rows[1]))
    with pytest.raises(DataError, match="are longer than data.max_seq_length=128"):
        prepare(tokenizer, tmp_path, train=str(path), val_set_size=0)


def test_a_split_that_takes_everything_is_an_error(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.val_set_size=5 takes all 5"):
        prepare(tokenizer, tmp_path, train=str(write(tmp_path / "a.jsonl", 5)), val_set_size=5)

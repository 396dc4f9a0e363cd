"""Rows for the report: with what is trained of them, without secrets, and never too long."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from llmtune.data.store.token_store import Row
from llmtune.train.hooks import data_examples
from llmtune.train.hooks.data_examples import DataExamples, describe_rows
from llmtune.train.training_state import TrainingState

SECRET = "hf_aSecretThatNobodyMaySee42"


class Letters:
    """A tokenizer with a token for each letter."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


class FakeRows:
    """Rows of text, each trained from its first capital letter on."""

    def __init__(self, *texts: str):
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def row(self, number: int) -> Row:
        text = self._texts[number]
        start = next((at for at, letter in enumerate(text) if letter.isupper()), len(text))
        mask = np.arange(len(text)) >= start
        ids = np.array([ord(letter) for letter in text], np.int32)
        return Row(ids=ids, mask=mask, documents=(len(text),))

    def documents(self, name: str) -> Any:
        rows = [self.row(number) for number in range(len(self))]
        return np.array([len(row.ids) if name == "lengths" else row.mask.sum() for row in rows])

    def first_document(self, number: int) -> int:
        return number

    def location(self, document: int) -> tuple[str, int]:
        return "rows.jsonl", document + 1


def describe(*texts: str) -> dict[str, Any]:
    return describe_rows(cast("Any", FakeRows(*texts)), cast("Any", Letters()))


def test_what_is_trained_is_told_apart() -> None:
    found = describe("question: Answer", "other: No", "last: Yes")
    assert found["rows"] == [
        {"from": "rows.jsonl:1", "pieces": [["question: ", False], ["Answer", True]]},
        {"from": "rows.jsonl:2", "pieces": [["other: ", False], ["No", True]]},
    ]
    assert sum(found["lengths"]["rows"]) == 3


def test_one_row_is_enough() -> None:
    assert [row["from"] for row in describe("a: B")["rows"]] == ["rows.jsonl:1"]


def test_a_secret_that_begins_in_one_piece_and_ends_in_another_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    text = json.dumps(describe(f"the token is {SECRET}: yes"))
    assert SECRET not in text
    assert "hf_a" not in text
    assert "***HF_TOKEN***" in text


def test_a_row_that_just_fits_is_whole() -> None:
    (row,) = describe("x" * 100 + "Y" * 3_900)["rows"]
    assert [len(text) for text, _ in row["pieces"]] == [100, 3_900]


@pytest.mark.parametrize("length", [3_901, 4_000, 100_000])
def test_a_long_row_is_cut_off(length: int) -> None:
    (row,) = describe("x" * 100 + "Y" * length)["rows"]
    shown = "".join(text for text, _ in row["pieces"])
    assert len(shown) <= 4_010
    assert shown.endswith(" ...")


def test_rows_that_cannot_be_read_stop_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError("the cache has gone")

    monkeypatch.setattr(data_examples, "open_rows", refuse)
    said: list[str] = []

    class First:
        is_first = True

    hook = DataExamples(
        run=tmp_path,
        rank=cast("Any", First()),
        data=cast("Any", None),
        tokenizer=cast("Any", None),
        say=said.append,
    )
    hook.on_start(TrainingState())
    assert said == ["data_examples.json is not written (OSError: the cache has gone)"]
    assert list(tmp_path.iterdir()) == []

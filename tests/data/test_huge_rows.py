"""One row of many megabytes takes little memory, holds up no progress line, and comes out as a
short one would.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from llmtune.config.groups.data import DataConfig, OnBadRow, Overlong
from llmtune.data.formats.format import detect_format
from llmtune.data.prepare import open_rows, prepare_data, read_problems
from llmtune.data.rows.problems import RowError
from llmtune.data.tokenize import encode, workers
from llmtune.data.tokenize.encode import Encoder, EncodeSettings, Overflow, TokenRow
from llmtune.data.tokenize.windows import WindowTokenizer
from llmtune.data.tokenized_source import TokenizeProgress

LONG = "one two three four. "


def text(letters: int) -> dict[str, Any]:
    return {"text": LONG * (letters // len(LONG))}


def chat(letters: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": text(letters)["text"]},
        ]
    }


def question(letters: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": text(letters)["text"]},
            {"role": "assistant", "content": "yes"},
        ]
    }


def label(letters: int) -> dict[str, Any]:
    return {"sentence1": text(letters)["text"], "sentence2": "b", "label": "pos"}


#: What a few windows take, and libraries that are imported on the way, whatever the row.
FIXED_BYTES = 100_000_000

UNCOUNTED = "the row has more tokens than data.max_seq_length=64"

KINDS = {kind.__name__: kind for kind in (text, chat, question, label)}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def peak_bytes(reset: bool) -> int:
    """The most memory that this process has had in use at a time, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("overlong", [Overlong.drop, Overlong.truncate])
@pytest.mark.parametrize("kind", ["text", "chat", "label"])
def test_a_huge_row_takes_a_few_times_its_own_size(
    kind: str, overlong: Overlong, tokenizer: Any, tmp_path: Path
) -> None:
    """An encoding of the whole takes two hundred times as much."""
    size = 2_000_000 if kind == "chat" and overlong is Overlong.truncate else 12_000_000
    file = write(tmp_path, *[KINDS[kind](100)] * 20, KINDS[kind](size))
    config = DataConfig(
        train=str(file), val_set_size=0, num_workers=0, overlong=overlong, on_bad_row=OnBadRow.skip
    )
    before = peak_bytes(reset=True)
    data = prepare_data(config, tokenizer, 1, tmp_path / "cache")
    assert (data.train.dropped, data.train.truncated) == (
        (1, 0) if overlong is Overlong.drop else (0, 1)
    )
    assert peak_bytes(reset=False) - before < FIXED_BYTES + 12 * size


def test_a_huge_text_is_split_in_little_memory_and_loses_nothing(
    tokenizer: Any, tmp_path: Path
) -> None:
    size = 5_000_000
    row = text(size)
    file = write(tmp_path, text(100), row)
    config = DataConfig(
        train=str(file), val_set_size=0, num_workers=0, overlong=Overlong.split, max_seq_length=1024
    )
    few = write(tmp_path / "few", *[text(100)] * 20)
    prepare_data(replace(config, train=str(few)), tokenizer, 1, tmp_path / "cache")
    before = peak_bytes(reset=True)
    data = prepare_data(config, tokenizer, 1, tmp_path / "cache")
    # A few windows; the row's bytes and its text, and five bytes a token, of which there are three
    # for five letters here.
    assert peak_bytes(reset=False) - before < 40_000_000 + 8 * size
    rows = open_rows(data, "train")
    ids = np.concatenate([rows.row(number).ids for number in range(1, len(rows))])
    assert tokenizer.decode(ids.tolist()) == row["text"] + tokenizer.eos_token


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.process
def test_the_progress_goes_on_within_a_row(
    workers: int, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtune.data.tokenize.workers.PULSE_SECONDS", 0.05)
    file = write(tmp_path, *[text(200_000)] * 8, text(1_000_000))
    config = DataConfig(
        train=str(file), val_set_size=0, num_workers=workers, overlong=Overlong.split
    )
    seen: list[TokenizeProgress] = []
    began = time.monotonic()
    prepare_data(config, tokenizer, 1, tmp_path / "cache", seen.append)
    assert len(seen) > 20, "there are few blocks, and many windows"
    assert [p.seconds for p in seen] == sorted(p.seconds for p in seen)
    assert [p.tokens for p in seen if not p.rows] == sorted(p.tokens for p in seen if not p.rows)
    gaps = np.diff([0.0, *(p.seconds for p in seen)])
    assert max(gaps) < max(2.0, (time.monotonic() - began) / 3)


def test_whoever_waits_for_a_worker_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtune.data.tokenize.workers.PULSE_SECONDS", 0.01)
    block: Future[Any] = Future()
    pulses: list[int] = []

    def pulse(tokens: int) -> None:
        pulses.append(tokens)
        if len(pulses) == 3:
            block.set_result("done")

    done: Any = workers._await(block, pulse)
    assert done == "done"
    assert pulses == [0, 0, 0]


@pytest.mark.parametrize("overlong", list(Overlong))
@pytest.mark.parametrize("size", [0, 1000, 6000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [64, 20_000])
def test_long_rows_come_out_as_if_they_were_encoded_at_once(
    kind: str,
    size: int,
    overlong: Overlong,
    limit: int,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = KINDS[kind](size + 100)
    conversations = [detect_format(row).read(row)] * 2
    settings = EncodeSettings(max_seq_length=limit, overlong=overlong, train_on_inputs=False)
    whole = Encoder(tokenizer, settings).encode(conversations)
    monkeypatch.setattr(encode, "WINDOW", 500)
    encoder = Encoder(tokenizer, settings)
    encoder._windows = WindowTokenizer(tokenizer.backend_tokenizer, 500, 240, 60)
    for expected, outcome in zip(whole, encoder.encode(conversations), strict=True):
        assert type(outcome) is type(expected)
        if isinstance(expected, Overflow):
            assert isinstance(outcome, Overflow)
            assert outcome.tokens in (0, expected.tokens)
        elif isinstance(expected, RowError):
            assert str(outcome) == str(expected) or (kind, str(outcome)) == ("label", UNCOUNTED)
        else:
            assert isinstance(outcome, list)
            assert len(outcome) == len(expected)
            for one, other in zip(outcome, expected, strict=True):
                assert isinstance(one, TokenRow)
                assert one.ids.tolist() == other.ids.tolist()
                assert one.mask.tolist() == other.mask.tolist()
                assert (one.truncated, one.label) == (other.truncated, other.label)


def test_a_length_that_would_do_is_named_only_where_it_is_known(
    tokenizer: Any, tmp_path: Path
) -> None:
    file = write(tmp_path, *[text(100)] * 10, text(400), text(420), text(900_000))
    config = DataConfig(
        train=str(file), val_set_size=0, num_workers=0, max_seq_length=128, max_overlong_share=0.1
    )
    (problem,) = read_problems(prepare_data(config, tokenizer, 1, tmp_path / "cache", strict=False))
    assert "3 of 13 rows" in problem.message
    enough = int(problem.message.rpartition("data.max_seq_length=")[2].split()[0])
    assert 128 < enough < 500
    config.max_overlong_share = 0.01
    (problem,) = read_problems(prepare_data(config, tokenizer, 1, tmp_path / "cache", strict=False))
    assert "would do" not in problem.message, "nobody counted the longest"

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
from llmtune.data.formats.recipe import Recipe
from llmtune.data.prepare import prepare_data
from llmtune.data.prepared_data import open_rows, read_problems
from llmtune.data.read.blocks import Block
from llmtune.data.rows.problems import RowError
from llmtune.data.tokenize import encode, workers
from llmtune.data.tokenize.settings import EncodeSettings
from llmtune.data.tokenize.token_row import Overflow, SplitRows, TokenRow
from llmtune.data.tokenize.windows import WindowTokenizer
from llmtune.data.tokenize.workers import make_encoder
from llmtune.data.tokenized_source import TokenizeProgress
from llmtune.plan.prepared_data import PreparedData
from tests.support import first, peak_bytes

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


def escaped(letters: int) -> dict[str, Any]:
    line = 'say "one",\n'
    return {"text": line * (letters // len(line))}


def late(letters: int) -> dict[str, Any]:
    """The first line may be an object around a list of rows until all of it has been read."""
    return {"first": text(letters)["text"], "text": "one two"}


#: Bytes that a few windows and a block of a million tokens take, whatever the row. A pair of texts
#: that is cut is encoded at once, up to two windows of each.
FIXED_BYTES = {"label": 80_000_000}

#: Forms of a row that are in memory at a time: its bytes, the decoded line, its values, the
#: rendered text. Python's parser makes the text of a value with escapes in a buffer that grows.
FORMS = {"escaped": 3.3}


UNCOUNTED = "the row has more tokens than data.max_seq_length=64"

KINDS = {kind.__name__: kind for kind in (text, chat, question, label, escaped, late)}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def prepare_in_bounds(
    config: DataConfig, tokenizer: Any, folder: Path, kind: str = "text"
) -> PreparedData:
    """Prepare data with one long row, in the memory of its forms and of a few windows."""
    # What is imported on the way, whatever the row, is there already.
    few = write(folder / "few", *[text(100)] * 20, text(100_000))
    prepare_data(replace(config, train=str(few)), tokenizer, 1, folder / "cache", strict=False)
    before = peak_bytes(reset=True)
    data = prepare_data(config, tokenizer, 1, folder / "cache", strict=False)
    size = Path(config.train).stat().st_size
    taken = peak_bytes(reset=False) - before
    assert taken < FIXED_BYTES.get(kind, 48_000_000) + FORMS.get(kind, 2.3) * size
    return data


@pytest.mark.parametrize(
    "size", [2_000_000, 8_000_000, pytest.param(32_000_000, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("overlong", [Overlong.drop, Overlong.truncate])
@pytest.mark.parametrize("kind", ["text", "chat", "label", "escaped"])
def test_a_huge_row_takes_twice_its_own_size(
    kind: str, overlong: Overlong, size: int, tokenizer: Any, tmp_path: Path
) -> None:
    """An encoding of the whole takes two hundred times as much."""
    if kind == "chat" and overlong is Overlong.truncate:
        # The end of its last turn is looked for.
        size //= 4
    file = write(tmp_path, *[KINDS[kind](100)] * 20, KINDS[kind](size))
    config = DataConfig(
        train=str(file), val_set_size=0, num_workers=0, overlong=overlong, on_bad_row=OnBadRow.skip
    )
    data = prepare_in_bounds(config, tokenizer, tmp_path, kind)
    assert (data.train.dropped, data.train.truncated) == (
        (1, 0) if overlong is Overlong.drop else (0, 1)
    )


@pytest.mark.parametrize("kind", ["text", "late"])
def test_so_does_one_that_is_the_first_of_its_file(
    kind: str, tokenizer: Any, tmp_path: Path
) -> None:
    size = 24_000_000
    file = write(tmp_path, KINDS[kind](size), *[KINDS[kind](100)] * 20)
    config = DataConfig(train=str(file), val_set_size=0, num_workers=0, max_overlong_share=1.0)
    data = prepare_in_bounds(config, tokenizer, tmp_path, kind)
    assert (data.train.rows, data.train.dropped) == ((21, 0) if kind == "late" else (20, 1))


@pytest.mark.parametrize(
    "size",
    first(1, [2_000_000, 8_000_000, 32_000_000]),
)
def test_a_huge_text_is_split_in_the_same_memory_and_loses_nothing(
    size: int, tokenizer: Any, tmp_path: Path
) -> None:
    row = text(size)
    file = write(tmp_path, text(100), row)
    config = DataConfig(
        train=str(file), val_set_size=0, num_workers=0, overlong=Overlong.split, max_seq_length=1024
    )
    data = prepare_in_bounds(config, tokenizer, tmp_path)
    rows = open_rows(data, "train")
    ids = np.concatenate([rows.row(number).ids for number in range(1, len(rows))])
    assert tokenizer.decode(ids.tolist()) == row["text"] + tokenizer.eos_token
    (store,) = {Path(name) for name in data.train_stores}
    assert {file.suffix for file in store.iterdir()} == {".arrow", ".json", ".jsonl", ".npy"}


@pytest.mark.process
def test_tokens_of_a_huge_text_come_from_a_worker_as_from_this_process(
    tokenizer: Any, tmp_path: Path
) -> None:
    """Through a file, since they are more than a block."""
    row = json.dumps(text(2_400_000)).encode()
    settings = EncodeSettings(max_seq_length=1024, overlong=Overlong.split, train_on_inputs=False)
    recipe = Recipe("text", {})

    def block() -> Block:
        return Block(file="a.jsonl", first=1, content=row, next=(len(row), 2))

    expected = list(
        workers.tokenize_block(
            block(), make_encoder(tokenizer, settings), recipe, most_tokens=workers.MOST_TOKENS
        )
    )
    assert len(expected) > 1
    with workers.TokenizerPool(tokenizer, settings, 1, tmp_path) as pool:
        assert pool._started is not None
        pool._started.result()
        found = list(pool.map([(block(), recipe)]))
        assert not list(tmp_path.iterdir())
    for one, other in zip(expected, found, strict=True):
        for name in ("ids", "mask", "lengths", "trained", "hashes", "begins", "lines"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name


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
@pytest.mark.parametrize("kind", ["text", "chat", "question", "label"])
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
    whole = make_encoder(tokenizer, settings).encode(conversations)
    monkeypatch.setattr(encode, "WINDOW", 500)
    encoder = make_encoder(tokenizer, settings)
    encoder._windows = WindowTokenizer(tokenizer.backend_tokenizer, 500, 240, 60)
    for expected, outcome in zip(whole, encoder.encode(conversations), strict=True):
        if isinstance(outcome, SplitRows):
            outcome = list(outcome)
        assert type(outcome) is type(expected)
        if isinstance(expected, Overflow):
            assert isinstance(outcome, Overflow)
            assert outcome.tokens in (0, expected.tokens)
        elif isinstance(expected, RowError):
            assert str(outcome) == str(expected) or (kind, str(outcome)) == ("label", UNCOUNTED)
        else:
            assert isinstance(expected, list)
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

"""Rows on disk: split, mixed, counted, cached by content, made by any number of processes."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llmtune.config.groups.data import DataConfig, Overlong
from llmtune.data.prepare import prepare_data
from llmtune.data.prepared_data import open_rows, read_samples
from llmtune.data.store.mixing import split_eval
from llmtune.data.tokenize.chat_template import load_chat_template
from llmtune.data.tokenized_source import TokenizeProgress
from llmtune.errors import ConfigError, DataError
from llmtune.plan.prepared_data import PreparedData


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def write(path: Path, count: int, words: int = 3, name: str = "question") -> Path:
    rows = [
        {"instruction": f"{name} {n}", "output": "word " * words + str(n)} for n in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def prepare(tokenizer: Any, cache: Path, watch: Any = None, **values: Any) -> PreparedData:
    return prepare_data(
        DataConfig(**{"max_seq_length": 128, **values}), tokenizer, 42, cache, watch
    )


def texts(data: PreparedData, split: str, tokenizer: Any) -> list[str]:
    rows = open_rows(data, split)
    return [tokenizer.decode(rows.row(number).ids.tolist()) for number in range(len(rows))]


def test_the_split_is_drawn_once_and_disjoint(tokenizer: Any, tmp_path: Path) -> None:
    source = str(write(tmp_path / "a.jsonl", 40))
    data = prepare(tokenizer, tmp_path, train=source, val_set_size=0.25)
    assert data.eval is not None
    assert (data.train.rows, data.eval.rows) == (30, 10)
    assert len(set(texts(data, "train", tokenizer)) | set(texts(data, "eval", tokenizer))) == 40
    samples = read_samples(data)
    assert len(samples) == 3
    held_out = texts(data, "eval", tokenizer)
    for number, sample in enumerate(samples):
        assert sample.messages[-1]["content"] in held_out[number]
        assert sample.expected in held_out[number]


def test_counts_are_those_of_the_rows(tokenizer: Any, tmp_path: Path) -> None:
    data = prepare(tokenizer, tmp_path, train=str(write(tmp_path / "a.jsonl", 10)), val_set_size=0)
    rows = [open_rows(data, "train").row(number) for number in range(10)]
    assert data.eval is None
    assert data.train.tokens == sum(len(row.ids) for row in rows)
    assert data.train.supervised_tokens == sum(int(row.mask.sum()) for row in rows)
    assert read_samples(data) == []


def test_the_cache_knows_the_content(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 10)
    first = prepare(tokenizer, tmp_path, train=str(path), val_set_size=2)
    assert prepare(tokenizer, tmp_path, train=str(path), val_set_size=2) == first
    tokens = len(list((tmp_path / "data/tokens").iterdir()))
    other = prepare(tokenizer, tmp_path, train=str(path), val_set_size=3)
    assert other.fingerprint != first.fingerprint
    assert len(list((tmp_path / "data/tokens").iterdir())) == tokens, (
        "another split tokenizes nothing again"
    )
    write(path, 11)
    assert (
        prepare(tokenizer, tmp_path, train=str(path), val_set_size=2).fingerprint
        != first.fingerprint
    )
    tokenizer.chat_template, kept = (
        tokenizer.chat_template + "{# changed #}",
        tokenizer.chat_template,
    )
    try:
        changed = prepare(tokenizer, tmp_path, train=str(path), val_set_size=2)
    finally:
        tokenizer.chat_template = kept
    assert (
        changed.fingerprint
        != prepare(tokenizer, tmp_path, train=str(path), val_set_size=2).fingerprint
    )


@pytest.mark.process
def test_worker_processes_make_the_same_rows_and_tell_their_progress(
    tokenizer: Any, tmp_path: Path
) -> None:
    source = str(write(tmp_path / "a.jsonl", 30_000))
    told: list[TokenizeProgress] = []
    alone = prepare(tokenizer, tmp_path / "1", train=source, num_workers=0)
    helped = prepare(tokenizer, tmp_path / "2", told.append, train=source, num_workers=2)
    assert helped.fingerprint == alone.fingerprint
    for split in ("train", "eval"):
        one, other = open_rows(alone, split), open_rows(helped, split)
        assert np.array_equal(one.documents("hashes"), other.documents("hashes"))
        assert np.array_equal(one.index, other.index)
    assert [progress.rows for progress in told] == sorted(progress.rows for progress in told)
    assert told[-1].rows == 30_000
    assert told[-1].share == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "known"),
    [("a.jsonl", True), ("a.ndjson", True), ("A.JSONL", True), ("a.jsonl.gz", False)],
)
def test_the_share_is_told_of_lines_that_are_not_compressed(
    name: str, known: bool, tokenizer: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / name, 10)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    told: list[TokenizeProgress] = []
    prepare(tokenizer, tmp_path, told.append, train=str(path), val_set_size=0)
    assert told[-1].share == (pytest.approx(1.0) if known else None)


def test_tokens_that_an_earlier_version_left_in_the_cache_are_read(
    tokenizer: Any, tmp_path: Path
) -> None:
    source = str(write(tmp_path / "a.jsonl", 10))
    first = prepare(tokenizer, tmp_path, train=source, val_set_size=2)
    (summary,) = (tmp_path / "data/tokens").glob("*/summary.json")
    summary.write_text(
        json.dumps({**json.loads(summary.read_text()), "tokens": 5, "label_kinds": {}})
    )
    again = prepare(tokenizer, tmp_path, train=source, val_set_size=3)
    assert again.train.documents == first.train.documents - 1


def test_own_evaluation_files_are_used_whole(tokenizer: Any, tmp_path: Path) -> None:
    train, held_out = write(tmp_path / "a.jsonl", 10), write(tmp_path / "b.jsonl", 4, words=9)
    data = prepare(tokenizer, tmp_path, train=[str(train), str(train)], eval=str(held_out))
    assert data.eval is not None
    assert (data.train.rows, data.eval.rows) == (20, 4)


def test_sources_are_limited_repeated_and_weighted(tokenizer: Any, tmp_path: Path) -> None:
    one, two = (
        write(tmp_path / "a.jsonl", 30, name="one"),
        write(tmp_path / "b.jsonl", 100, name="two"),
    )

    def counts(*sources: Any) -> tuple[int, int]:
        data = prepare(tokenizer, tmp_path, train=list(sources), val_set_size=0)
        found = texts(data, "train", tokenizer)
        assert (
            texts(
                prepare(tokenizer, tmp_path / "x", train=list(sources), val_set_size=0),
                "train",
                tokenizer,
            )
            == found
        )
        return sum("one" in text for text in found), sum("two" in text for text in found)

    assert counts(f"{one}@7", str(two)) == (7, 100)
    assert counts({"path": str(one), "repeat": 3}, {"path": str(two), "limit": 5}) == (90, 5)
    assert counts({"path": str(one), "weight": 1}, {"path": str(two), "weight": 1}) == (30, 30)
    assert counts(
        {"path": str(one), "weight": 3, "repeat": 2}, {"path": str(two), "weight": 1}
    ) == (60, 20)


def test_limited_sources_of_one_size_give_different_rows_wherever_they_lie(
    tokenizer: Any, tmp_path: Path
) -> None:
    def drawn(folder: str, name: str) -> list[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        source = f"{write(tmp_path / folder / name, 100, name=name)}@5"
        data = prepare(tokenizer, tmp_path / folder / "cache", train=source, val_set_size=0)
        return [text.rpartition(" ")[2] for text in texts(data, "train", tokenizer)]

    assert len(drawn("here", "a.jsonl")) == 5
    assert drawn("here", "a.jsonl") == drawn("there", "a.jsonl") != drawn("here", "b.jsonl")


def test_a_held_out_row_of_a_repeated_source_is_not_trained(tokenizer: Any, tmp_path: Path) -> None:
    source = {"path": str(write(tmp_path / "a.jsonl", 20)), "repeat": 3}
    data = prepare(tokenizer, tmp_path, train=source, val_set_size=5)
    train, held_out = texts(data, "train", tokenizer), texts(data, "eval", tokenizer)
    assert (len(train), len(held_out)) == (45, 5)
    assert not set(train) & set(held_out)


def test_rows_that_equal_a_held_out_one_are_left_out_of_training(
    tokenizer: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", 40)
    data = prepare(tokenizer, tmp_path, train=[str(path), str(path)], val_set_size=10)
    train, held_out = texts(data, "train", tokenizer), texts(data, "eval", tokenizer)
    assert len(held_out) == 10
    assert not set(train) & set(held_out)
    assert len(train) + data.train.duplicates_of_eval == 70
    assert data.train.duplicates_of_eval > 0


def test_a_weighted_source_without_a_usable_row_is_an_error(tokenizer: Any, tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl", 30), write(tmp_path / "b.jsonl", 30, words=500)
    sources = [{"path": str(one), "weight": 1}, {"path": str(two), "weight": 1}]
    with pytest.raises(DataError, match=r"b.jsonl has a weight, but no row that can be trained on"):
        prepare(tokenizer, tmp_path, train=sources, val_set_size=0, max_overlong_share=1.0)


def test_evaluation_takes_each_row_once(tokenizer: Any, tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl", 10), write(tmp_path / "b.jsonl", 10, name="other")
    with pytest.raises(ConfigError, match=r"data.eval: repeat=2 of .*b.jsonl"):
        prepare(tokenizer, tmp_path, train=str(one), eval={"path": str(two), "repeat": 2})


def test_the_same_file_can_be_read_in_two_ways(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("a,b,c\n" + "".join(f"ask {n},one {n},two {n}\n" for n in range(20)))
    ways = [
        {"path": str(path), "fields": {"instruction": "a", "output": column}}
        for column in ("b", "c")
    ]
    data = prepare(tokenizer, tmp_path, train=ways, val_set_size=6)
    held_out = texts(data, "eval", tokenizer)
    assert all(
        sample.expected in held_out[number] for number, sample in enumerate(read_samples(data))
    )


def test_a_base_model_needs_a_template_for_chats_only(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        "\n".join(json.dumps({"text": f"text {n}"}) for n in range(10))
    )
    chats = write(tmp_path / "a.jsonl", 10)
    tokenizer.chat_template, kept = None, tokenizer.chat_template
    try:
        assert (
            prepare(tokenizer, tmp_path, train=str(tmp_path / "t.jsonl"), val_set_size=0).train.rows
            == 10
        )
        with pytest.raises(ConfigError, match="has no chat template"):
            prepare(tokenizer, tmp_path, train=str(chats), val_set_size=0)
    finally:
        tokenizer.chat_template = kept


@pytest.mark.process
def test_killed_preparation_leaves_no_process_behind(tiny_model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", 400_000)
    program = f"""
from pathlib import Path
from transformers import AutoTokenizer
from llmtune.config.groups.data import DataConfig
from llmtune.data.prepare import prepare_data

if __name__ == "__main__":
    config = DataConfig(train={str(source)!r}, num_workers=1)
    tokenizer = AutoTokenizer.from_pretrained({str(tiny_model)!r})
    prepare_data(config, tokenizer, 1, Path({str(tmp_path / "cache")!r}), lambda told: print(told.rows, flush=True))
"""  # noqa: E501
    script = tmp_path / "program.py"
    script.write_text(program)
    started = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    family: list[psutil.Process] = []
    while len(family) < 3:
        assert started.stdout.readline(), "it ended before its worker was seen"
        family = psutil.Process(started.pid).children(recursive=True)
    started.kill()
    started.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    for process in alive:
        process.kill()
    assert not alive


def test_packing_keeps_every_row_and_fills(tokenizer: Any, tmp_path: Path) -> None:
    source = str(write(tmp_path / "a.jsonl", 200))
    plain = prepare(tokenizer, tmp_path, train=source, val_set_size=0)
    packed = prepare(
        tokenizer, tmp_path, train=source, val_set_size=0, packing=True, max_seq_length=512
    )
    rows = open_rows(packed, "train")
    assert packed.train.documents == plain.train.rows == 200
    assert packed.train.tokens == plain.train.tokens == int(rows.lengths.sum())
    assert packed.train.supervised_tokens == plain.train.supervised_tokens
    assert packed.train.packing_efficiency is not None
    assert packed.train.packing_efficiency > 0.9
    assert all(sum(row.documents) == len(row.ids) <= 512 for row in map(rows.row, range(len(rows))))


def test_dropped_rows_are_counted_and_none_left_is_an_error(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"instruction": "q", "output": "word " * n} for n in (2, 300)]
    path.write_text("\n".join(map(json.dumps, rows)))
    given = {"train": str(path), "val_set_size": 0, "max_overlong_share": 1.0}
    data = prepare(tokenizer, tmp_path, **given)
    assert (data.train.rows, data.train.dropped) == (1, 1)
    data = prepare(tokenizer, tmp_path, **given, overlong=Overlong.truncate)
    assert (data.train.rows, data.train.truncated) == (2, 1)
    path.write_text(json.dumps(rows[1]))
    with pytest.raises(DataError, match="are longer than data.max_seq_length=128"):
        prepare(tokenizer, tmp_path, **given)


def test_a_split_that_takes_everything_is_an_error(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="data.val_set_size=5 takes all of data.train, which has 5 rows"
    ):
        prepare(tokenizer, tmp_path, train=str(write(tmp_path / "a.jsonl", 5)), val_set_size=5)


def test_class_names_are_kept(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("sentence1,sentence2,label\na,b,entailment\nc,d,neutral\ne,f,neutral\n")
    data = prepare(tokenizer, tmp_path, train=str(path), val_set_size=0)
    assert data.classes == ["entailment", "neutral"]


def long_texts(path: Path, count: int, words: int) -> str:
    rows = [
        {"text": " ".join(f"d{number} w{word}" for word in range(words))} for number in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def documents_of(data: PreparedData, split: str) -> set[tuple[str, int]]:
    rows = open_rows(data, split)
    return {location for number in range(len(rows)) for location in rows.locations(number)}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("size", [3, 0.25])
def test_a_text_that_is_cut_is_held_out_whole(
    packing: bool, size: int | float, tokenizer: Any, tmp_path: Path
) -> None:
    source = long_texts(tmp_path / "a.jsonl", 12, 60)
    data = prepare(
        tokenizer,
        tmp_path,
        train=source,
        overlong=Overlong.split,
        max_seq_length=32,
        packing=packing,
        val_set_size=size,
    )
    assert data.eval is not None
    trained, held_out = documents_of(data, "train"), documents_of(data, "eval")
    assert (len(trained), len(held_out)) == (9, 3), "documents are counted, not their pieces"
    assert not trained & held_out
    assert data.train.documents + data.eval.documents > 40, "they are cut"
    everything = prepare(
        tokenizer,
        tmp_path,
        train=source,
        overlong=Overlong.split,
        max_seq_length=32,
        packing=packing,
        val_set_size=0,
    )
    assert data.train.tokens + data.eval.tokens == everything.train.tokens, "no piece is lost"


def test_rows_of_one_line_are_documents_of_their_own(tokenizer: Any, tmp_path: Path) -> None:
    source = tmp_path / "a.json"
    source.write_text(json.dumps([{"text": f"Z{number} " + "word " * 60} for number in range(8)]))
    data = prepare(
        tokenizer,
        tmp_path,
        train=str(source),
        overlong=Overlong.split,
        max_seq_length=32,
        val_set_size=2,
    )
    names = [
        {text.split()[0] for text in texts(data, split, tokenizer) if text.startswith("Z")}
        for split in ("train", "eval")
    ]
    assert [len(found) for found in names] == [6, 2]
    assert not names[0] & names[1]


def test_the_only_text_cannot_be_held_out_and_trained_on(tokenizer: Any, tmp_path: Path) -> None:
    source = long_texts(tmp_path / "a.jsonl", 1, 200)
    with pytest.raises(
        DataError,
        match=r"takes all of data.train, which has 1 row, cut into \d+ pieces but held out whole",
    ):
        prepare(tokenizer, tmp_path, train=source, overlong=Overlong.split, max_seq_length=32)
    data = prepare(
        tokenizer,
        tmp_path,
        train=source,
        overlong=Overlong.split,
        max_seq_length=32,
        val_set_size=0,
    )
    assert (data.train.documents > 10, data.eval) == (True, None)


def test_a_text_that_stands_twice_is_not_on_both_sides_and_its_tail_alone_is_no_twin(
    tokenizer: Any, tmp_path: Path
) -> None:
    texts_of = [f"Z{number} " + "word " * 60 for number in range(8)]
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts_of * 2))
    split = {"overlong": Overlong.split, "max_seq_length": 32}
    data = prepare(tokenizer, tmp_path, train=str(source), val_set_size=4, **split)
    assert data.eval is not None
    assert data.train.duplicates_of_eval > 0
    names = [
        {text.split()[0] for text in texts(data, half, tokenizer) if text.startswith("Z")}
        for half in ("train", "eval")
    ]
    assert not names[0] & names[1]
    # The pieces behind the first are the same in all of these texts, which does not make them one
    # text.
    assert data.train.documents >= 2 * len(names[0])


@settings(deadline=None)
@given(
    pieces=st.lists(st.integers(1, 5), min_size=2, max_size=30),
    size=st.integers(0, 5) | st.floats(0.01, 0.9),
    seed=st.integers(0, 100),
)
def test_no_document_is_on_both_sides(pieces: list[int], size: int | float, seed: int) -> None:
    begins = np.array([piece == 0 for count in pieces for piece in range(count)])
    document = np.cumsum(begins) - 1
    wanted = size if isinstance(size, int) else max(1, round(size * len(pieces)))
    if wanted >= len(pieces):
        with pytest.raises(DataError):
            split_eval(begins, size, seed)
        return
    keep, held_out = split_eval(begins, size, seed)
    assert sorted([*keep.tolist(), *held_out.tolist()]) == list(range(len(begins)))
    assert not set(document[keep]) & set(document[held_out])
    assert len(set(document[held_out])) == wanted


def test_a_sample_is_asked_with_all_that_the_row_says_before_its_answer(
    tiny_model: Path, tmp_path: Path
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = load_chat_template("qwen")
    call = {"id": "x", "function": {"name": "clock", "arguments": '{"town": "t"}'}}
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "time?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "x", "content": "0:00"},
        {"role": "assistant", "content": "midnight"},
    ]
    source = tmp_path / "a.jsonl"
    rows = [
        {"messages": [{**turns[0], "content": f"time {n}?"}, *turns[1:][:length]], "tools": tools}
        for n, length in ((0, 1), (1, 3))
    ]
    source.write_text("\n".join(map(json.dumps, rows)))
    data = prepare(
        tokenizer,
        tmp_path,
        train=str(write(tmp_path / "b.jsonl", 3)),
        eval=str(source),
        max_seq_length=512,
    )
    samples = read_samples(data)
    assert [sample.expected for sample in samples] == [
        (
            '[{"id": "x", "type": "function", "function": {"name": "clock", "arguments": {"town":'
            ' "t"}}}]'
        ),
        "midnight",
    ]
    for sample, whole in zip(samples, texts(data, "eval", tokenizer), strict=True):
        assert whole.startswith(sample.text)
        assert '"name": "clock"' in sample.text
        assert sample.text.endswith("<|im_start|>assistant\n")

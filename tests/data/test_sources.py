"""Files of every kind and from everywhere give the same rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from llmtune.data.read.blocks import count_rows, parse_rows, select_rows
from llmtune.data.read.parse_sources import parse_sources
from llmtune.data.read.readers import read_blocks
from llmtune.data.read.sources import Source, resolve_files
from llmtune.data.read.stdlib_docs import read_stdlib_docs
from llmtune.errors import ConfigError, DataError, MissingPrerequisiteError

ROWS = [
    {"instruction": f"question {number} ä", "output": "x" * (number % 5 + 1)}
    for number in range(2500)
]


def read(path: str, **more: Any) -> list[tuple[str, int, Any]]:
    source = Source(path=path, **more)
    return [
        (block.file, line, row)
        for file in resolve_files(source)
        for block in read_blocks(file, source)
        for line, row in parse_rows(block)
    ]


def rows_of(path: str) -> list[Any]:
    return [row for _, _, row in read(path)]


def write(path: Path, rows: Any = None) -> Path:
    """A file of the kind that its name says."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = ROWS if rows is None else rows
    name = path.name
    if ".parquet" in name:
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if ".arrow" in name:
        table = pa.Table.from_pylist(rows)
        opened = pa.ipc.new_stream if "stream" in name else pa.ipc.new_file
        with opened(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=700)
        return path
    with fsspec.open(str(path), "wt", compression="infer", encoding="utf-8", newline="") as file:
        if ".jsonl" in name:
            file.write("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
        elif ".json" in name:
            json.dump(rows, file, indent=1)
        else:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if ".tsv" in name else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


KINDS = [
    "a.jsonl",
    "a.ndjson.jsonl",
    "a.json",
    "a.csv",
    "a.tsv",
    "a.parquet",
    "a.arrow",
    "a.stream.arrow",
]
KINDS += ["a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst", "a.csv.gz", "a.json.gz"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    assert rows_of(str(write(tmp_path / name))) == ROWS


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet", "a.json", "a.arrow"]
)
def test_reading_goes_on_behind_any_block(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtune.data.read.readers.BLOCK_BYTES", 20_000)
    source = Source(path=str(write(tmp_path / name)))
    (file,) = resolve_files(source)
    blocks = list(read_blocks(file, source))
    assert len(blocks) > 2
    again = list(read_blocks(file, source, blocks[1].next))
    expected = [pair for block in blocks[2:] for pair in parse_rows(block)]
    assert [pair for block in again for pair in parse_rows(block)] == expected


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "a"}\n\n{"text": "b"}')
    assert [line for _, line, _ in read(str(path))] == [2, 4]
    listed = tmp_path / "a.json"
    listed.write_text('[\n {"text": "a"},\n\n {"text":\n "b"}, {"text": "c"}]')
    assert [line for _, line, _ in read(str(listed))] == [2, 4, 5]


def test_json_lines_under_the_name_json_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert [row["text"] for row in rows_of(str(path))] == ["a", "b"]


def test_a_line_separator_inside_a_json_string_is_no_line_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b"}, ensure_ascii=False))
    assert rows_of(str(path)) == [{"text": "a\u2028b"}]


def test_patterns_folders_and_urls_name_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in/b.jsonl", ROWS[5:10])
    write(tmp_path / "in/a.parquet", ROWS[:5])
    (tmp_path / "in/README").write_text("no data")
    assert rows_of(str(tmp_path / "in")) == ROWS[:10]
    assert rows_of(str(tmp_path / "in/*.jsonl")) == ROWS[5:10]
    assert rows_of(f"file://{tmp_path}/in/*.jsonl") == ROWS[5:10]
    monkeypatch.chdir(tmp_path)
    assert read("in/b.jsonl")[0][0] == "in/b.jsonl", "named as the user wrote it"


def test_a_name_with_brackets_is_that_file(tmp_path: Path) -> None:
    write(tmp_path / "a[1].jsonl", ROWS[:3])
    write(tmp_path / "a1.jsonl", ROWS[3:5])
    assert rows_of(str(tmp_path / "a[1].jsonl")) == ROWS[:3]


def test_arrow_and_json_give_the_same_nested_rows(tmp_path: Path) -> None:
    calls = [{"name": "add", "arguments": {"a": 1}}, {"name": "send", "arguments": {"to": "x"}}]
    rows = [
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]} for call in calls
    ]
    assert (
        rows_of(str(write(tmp_path / "a.parquet", rows)))
        == rows_of(str(write(tmp_path / "a.jsonl", rows)))
        == rows
    )


def test_records_of_several_lines_are_named_by_their_first(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text\n"one\ntwo\nthree"\n"four"\n')
    assert [line for _, line, _ in read(str(path))] == [2, 5]


def test_an_object_store_is_read_through_fsspec() -> None:
    memory = fsspec.filesystem("memory")
    with memory.open("/bucket/x/a.jsonl", "wb") as file:
        file.write("\n".join(map(json.dumps, ROWS[:7])).encode())
    try:
        assert rows_of("memory://bucket/x/a.jsonl") == ROWS[:7]
        assert rows_of("memory://bucket/x/*.jsonl") == ROWS[:7]
    finally:
        memory.rm("/bucket", recursive=True)


def test_folders_of_save_to_disk_are_read_with_their_split(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    whole = Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    DatasetDict({"train": whole, "test": whole.select(range(3))}).save_to_disk(tmp_path / "two")
    assert rows_of(str(tmp_path / "one")) == ROWS
    assert [row for _, _, row in read(str(tmp_path / "two"), split="test")] == ROWS[:3]
    with pytest.raises(DataError, match="split=dev"):
        read(str(tmp_path / "two"), split="dev")


def test_a_hub_id_without_a_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", "teknium/OpenHermes-2.5"):
        with pytest.raises(MissingPrerequisiteError, match=f"{name}: .* hub cannot be reached"):
            read(name)


def test_some_rows_can_be_drawn(tmp_path: Path) -> None:
    source = Source(path=str(write(tmp_path / "a.jsonl")))
    (file,) = resolve_files(source)
    assert count_rows(read_blocks(file, source)) == len(ROWS)
    drawn = [
        pair
        for block in select_rows(read_blocks(file, source), [2400, 3])
        for pair in parse_rows(block)
    ]
    assert drawn == [(2401, ROWS[2400]), (4, ROWS[3])], "in the order drawn"


def test_an_entry_is_a_path_or_a_mapping() -> None:
    values = [
        {"path": "a.jsonl@5", "weight": 1},
        {"path": "b.csv", "format": "alpaca", "weight": 2},
    ]
    assert parse_sources(values, "data.train", "auto") == [
        Source(path="a.jsonl", limit=5, weight=1),
        Source(path="b.csv", format="alpaca", weight=2),
    ]
    mapped = {
        "path": "b",
        "format": "text",
        "fields": {"text": "body"},
        "repeat": 2,
        "limit": 3,
        "split": "test",
    }
    assert parse_sources(mapped, "data.train", "auto") == [
        Source(path="b", format="text", fields={"text": "body"}, limit=3, repeat=2, split="test")
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"path": "a", "wieght": 2},
            "data.train.wieght: unknown; a source has fields, format, ignore, limit",
        ),
        ({"path": "a", "limit": 0}, "data.train.limit=0: must be a number above 0"),
        (
            {"path": "a", "format": "alpacca"},
            "data.train.format=alpacca: must be one of auto, alpaca",
        ),
        ({"path": "a", "fields": "x"}, "data.train.fields=x: a mapping such as"),
        ([{"path": "a", "weight": 1}, "b"], "data.train: b has no weight"),
        ({"file": "a"}, "a file name, or a mapping with path"),
    ],
)
def test_a_wrong_entry_is_named(value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sources(value, "data.train", "auto")
    assert message in str(caught.value)


def test_the_standard_library_gives_about_1300_pairs() -> None:
    pairs = read_stdlib_docs()
    assert 1000 < len(pairs) < 1700
    assert len({pair.messages[0].content for pair in pairs}) == len(pairs)
    known = next(pair for pair in pairs if "re.findall(" in pair.messages[0].content)
    assert known.messages[1].content.startswith("Return a list of all non-overlapping matches")

"""JSON files as people have them: a list, an object around one, objects over several lines, and
lines under either name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtune.data.read.blocks import parse_rows
from llmtune.data.read.json_files import is_whole, may_be_around_rows
from llmtune.data.read.readers import BLOCK_BYTES, read_blocks
from llmtune.data.read.sources import DataFile, Source
from llmtune.errors import DataError

ROWS = [{"instruction": f"q {number}", "output": f"a [{number}], {{b}}\n"} for number in range(4)]

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def pretty(value: Any) -> str:
    return json.dumps(value, indent=1)


#: What the file is, its text, and the lines on which its rows begin.
FILES: dict[str, tuple[str, list[int]]] = {
    "lines": ("".join(json.dumps(row) + "\n" for row in ROWS), [1, 2, 3, 4]),
    "lines without the last newline": ("\n\n" + "\n".join(map(json.dumps, ROWS)), [3, 4, 5, 6]),
    "a list": (json.dumps(ROWS), [1, 1, 1, 1]),
    "a list over lines": (pretty(ROWS), [2, 6, 10, 14]),
    "an object around them": (json.dumps({"data": ROWS}) + "\n", [1, 1, 1, 1]),
    "an object around them, over lines": ("\n" + pretty({"data": ROWS}), [4, 8, 12, 16]),
    "an object that says more": (
        pretty({"version": "1.1", "rows": ROWS, "n": {"of": [{}]}}),
        [4, 8, 12, 16],
    ),
    "by the name of the split": (json.dumps({"test": [{"a": 1}], "train": ROWS}), [1, 1, 1, 1]),
    "objects over lines": ("\n".join(map(pretty, ROWS)), [1, 5, 9, 13]),
    "objects over lines, with commas": (",\n".join(map(pretty, ROWS)), [1, 5, 9, 13]),
    "objects whose first field is on the first line": (
        "\n".join(json.dumps(row).replace(", ", ",\n  ", 1) for row in ROWS),
        [1, 3, 5, 7],
    ),
    "a byte order mark": ("\ufeff" + pretty({"data": ROWS}), [3, 7, 11, 15]),
}


def read(path: Path, **values: Any) -> list[tuple[int, Any]]:
    file = DataFile(str(path), "json" if path.suffix == ".json" else "jsonl")
    return [
        pair
        for block in read_blocks(file, Source(path=str(path), **values))
        for pair in parse_rows(block)
    ]


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize("name", FILES)
def test_rows_are_found_with_their_lines(name: str, ending: str, tmp_path: Path) -> None:
    text, lines = FILES[name]
    path = tmp_path / f"a.{ending}"
    path.write_text(text, encoding="utf-8")
    assert read(path) == list(zip(lines, ROWS, strict=True))


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize("write", [json.dumps, pretty])
@pytest.mark.parametrize(
    ("row", "fields"),
    [
        (CHAT, {}),
        ({"conversations": [{"from": "human", "value": "x"}]}, {}),
        ({"turns": CHAT["messages"]}, {"messages": "turns"}),
        ({"text": "x", "data": [{"text": "y"}]}, {}),
    ],
)
def test_an_object_that_is_a_row_itself_stays_one(
    row: Any, fields: Any, write: Any, ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_text(write(row))
    assert read(path, fields=fields) == [(1, row)]


def test_a_long_line_around_all_rows_is_told_from_a_long_row(tmp_path: Path) -> None:
    rows = [{"text": "word " * 1000}] * (BLOCK_BYTES // 2000)
    around, alone = tmp_path / "around.jsonl", tmp_path / "alone.jsonl"
    around.write_text(json.dumps({"version": 1, "data": rows}))
    assert around.stat().st_size > 2 * BLOCK_BYTES
    assert len(read(around)) == len(rows)
    alone.write_text(json.dumps({"text": "word " * BLOCK_BYTES}) + "\n" + json.dumps({"text": "x"}))
    assert [line for line, _ in read(alone)] == [1, 2]


def test_a_broken_line_breaks_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"instruction": "x", "out\n' + json.dumps(ROWS[0]))
    (first, broken), (second, row) = read(path)
    assert (first, second, row) == (1, 2, ROWS[0])
    assert "broken JSON at column" in str(broken)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"data": [\n{"text": "a"},\n{"text"]}', "a.json:4: broken JSON at column 8"),
        (
            json.dumps({"a": [{"x": 1}], "b": [{"x": 2}]}),
            "a.json:1: the object has lists of rows in 'a', 'b'; say which",
        ),
        (
            json.dumps({"system": "Be kind.", "data": [{"text": "a"}]}),
            (
                "a.json:1: beside the rows in 'data', the field 'system' ('Be kind.') belongs to"
                " the text"
            ),
        ),
        (pretty(ROWS[0]) + "\nand more", "a.json:5: broken JSON at column 1"),
    ],
)
def test_what_cannot_be_told_is_said_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


def test_a_stream_goes_on_in_the_middle_of_an_object_around_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"data": [{"text": str(number)} for number in range(2500)]}))
    file, source = DataFile(str(path), "jsonl"), Source(path=str(path))
    first, *others = read_blocks(file, source)
    again = list(read_blocks(file, source, first.next))
    assert [block.content for block in again] == [block.content for block in others]
    assert sum(len(block.content) for block in (first, *again)) == 2500


def test_what_the_first_bytes_say() -> None:
    assert not is_whole(b"")
    assert not is_whole(b'{"text": "\xff"}\n')
    assert is_whole(b"  [")
    assert may_be_around_rows(b'{"data": [{')
    assert not may_be_around_rows(b'{"data": [{\n')
    assert not may_be_around_rows(b'{"messages')

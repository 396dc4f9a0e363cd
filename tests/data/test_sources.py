"""Files of every kind, and what is said of broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtune.config.schema import DataFormat
from llmtune.data.conversation import Role
from llmtune.data.sources import read_source
from llmtune.data.stdlib_docs import read_stdlib_docs
from llmtune.errors import DataError

ALPACA = {"instruction": "Add", "input": "1 2", "output": "3"}
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def read(path: Path, data_format: DataFormat = DataFormat.auto) -> Any:
    return read_source(str(path), data_format, seed=0)


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [ALPACA, {**ALPACA, "system": "Be brief.", "input": ""}]
    rows = [{"system": "", **row} for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("instruction,input,output,system\nAdd,1 2,3,\nAdd,,3,Be brief.\n")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = {suffix: read(tmp_path / f"a.{suffix}") for suffix in ("jsonl", "json", "csv", "parquet")}
    texts = {suffix: [[m.to_dict() for m in c.messages] for c in rows] for suffix, rows in found.items()}
    assert texts["jsonl"] == texts["json"] == texts["csv"] == texts["parquet"]
    assert texts["jsonl"][0] == [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}]
    assert texts["jsonl"][1][0] == {"role": "system", "content": "Be brief."}
    assert found["jsonl"][1].where.endswith("a.jsonl:2")


def test_messages_may_have_several_turns(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES["messages"] * 2}))
    assert [m.role for m in read(path)[0].messages] == [Role.user, Role.assistant] * 2


def test_a_source_can_be_limited(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({**ALPACA, "input": str(n)}) for n in range(20)))
    some = read_source(f"{path}@5", DataFormat.auto, seed=1)
    assert len(some) == 5
    assert some == read_source(f"{path}@5", DataFormat.auto, seed=1)
    assert some != read_source(f"{path}@5", DataFormat.auto, seed=2)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.jsonl", None, "none.jsonl: no such file"),
        ("empty.jsonl", "", "empty.jsonl: the file has no rows"),
        ("empty.json", "", "empty.json: the file has no rows"),
        ("empty.csv", "instruction,output\n", "empty.csv: the file has no rows"),
        ("a.txt", "x", "a.txt: unknown kind of file; data.train takes .jsonl, .json, .csv, .parquet"),
        ("b.jsonl", json.dumps(ALPACA) + '\n{"instruction": "x"', "b.jsonl:2: broken JSON at column 20"),
        ("b.json", '[{"a": 1},\n {]', "b.json: broken JSON at line 2, column 3"),
        ("c.json", '{"instruction": 1}', "c.json: must hold a list of rows, not dict"),
        ("d.jsonl", "[1, 2]", "d.jsonl:1: a row must be an object with named fields, not list"),
        ("e.jsonl", '{"instruction": "x"}', "e.jsonl:1: the field 'output' is missing (the row has: instruction)"),
        ("f.jsonl", '{"instruction": "x", "output": ""}', "f.jsonl:1: the field 'output' is empty"),
        ("g.jsonl", '{"instruction": "x", "output": 3}', "g.jsonl:1: the field 'output' must be text, not 3"),
        ("h.jsonl", '{"question": "x"}', "h.jsonl:1: cannot tell the format by the fields question"),
        ("i.jsonl", '{"messages": "x"}', "i.jsonl:1: 'messages' must be a list"),
        ("j.jsonl", '{"messages": [{"role": "bot", "content": "x"}]}', "j.jsonl:1: messages[0]: role is 'bot'"),
        ("k.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', "k.jsonl:1: the last message is the user's"),
        ("l.csv", "instruction,output\na,b,c\n", "l.csv:2: more columns than the header names"),
        ("m.parquet", "no parquet", "m.parquet: not a Parquet file"),
    ],
)
def test_a_broken_file_is_named_with_line_and_reason(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError) as caught:
        read(path)
    assert message in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_other_encodings_are_named_with_the_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b'instruction,output\n"a","b"\n"\xe4","x"\n')
    with pytest.raises(DataError, match=rf"{name}:3: not UTF-8 \(byte 0xe4\)"):
        read(path)


def test_a_line_separator_inside_a_json_string_is_no_line_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({**ALPACA, "output": "a\u2028b"}, ensure_ascii=False))
    assert read(path)[0].messages[-1].content == "a\u2028b"


def test_the_standard_library_gives_about_1300_pairs() -> None:
    pairs = read_stdlib_docs()
    assert 1000 < len(pairs) < 1700
    assert len({pair.messages[0].content for pair in pairs}) == len(pairs)
    known = next(pair for pair in pairs if "re.findall(" in pair.messages[0].content)
    assert known.messages[1].content.startswith("Return a list of all non-overlapping matches")
    assert pairs == read_stdlib_docs()

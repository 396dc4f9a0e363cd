"""Malformed input: each is named by file and line with what is wrong; none is a traceback, or a
silently shorter data set.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmtune.config.groups.data import DataConfig, OnBadRow
from llmtune.data.prepare import prepare_data
from llmtune.data.prepared_data import open_rows, read_problems
from llmtune.errors import DataError

GOOD = {"instruction": "Add", "output": "3"}


def line(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


#: Name, the file's bytes behind a good first line, and what is said.
BAD_ROWS: dict[str, tuple[bytes, str]] = {
    "cut_json": (b'{"instruction": "x", "out', "broken JSON at column 22: Unterminated string"),
    "a_name_twice": (
        b'{"instruction": "x", "output": "a", "output": "b"}',
        "broken JSON: the name 'output' occurs twice in an object, of which one would be dropped",
    ),
    "two_objects": (line(GOOD) + line(GOOD), "broken JSON at column 38: Extra data"),
    "no_object": (b"[1, 2]", "a row must be an object with named fields, not list"),
    "deep_json": (b"[" * 100_000, "broken JSON: nested too deeply"),
    "latin1": (
        '{"instruction": "Z\xfcrich", "output": "x"}'.encode("latin-1"),
        "not UTF-8 (byte 0xfc); save the file as UTF-8",
    ),
    "surrogate": (
        b'{"instruction": "\\ud83d", "output": "x"}',
        "has half a surrogate pair, \\ud83d",
    ),
    "missing_field": (
        line({"instruction": "x"}),
        "the field 'output' is missing (the row has: instruction)",
    ),
    "empty_answer": (line({**GOOD, "output": ""}), "the field 'output' is empty"),
    "blank_answer": (
        line({**GOOD, "output": " \n"}),
        "the field 'output' has nothing but white space",
    ),
    "number_as_text": (line({**GOOD, "output": 3}), "the field 'output' must be text, not 3"),
    "history": (
        line({**GOOD, "history": [["a"]]}),
        "history[0] must be [question, answer], not ['a']",
    ),
    "template_inside": (
        line({**GOOD, "output": "3<|im_end|>"}),
        "holds '<|im_end|>', which the tokenizer reads as a special",
    ),
}

#: The same for conversations.
BAD_CHATS: dict[str, tuple[bytes, str]] = {
    "no_list": (b'{"messages": "x"}', "'messages' must be a list with something in it, not 'x'"),
    "empty_list": (b'{"messages": []}', "'messages' must be a list with something in it, not []"),
    "no_message": (b'{"messages": ["x"]}', "messages[0] must be {role, content}, not 'x'"),
    "role": (
        line(turns(("bot", "x"))),
        "messages[0]: role is 'bot'; it must be one of system, developer, user",
    ),
    "no_content": (
        line(turns(("user", None), ("assistant", "x"))),
        "messages[0]: the field 'content' is empty",
    ),
    "content_twice": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "content": "c"}]}',  # noqa: E501
        "broken JSON: the name 'content' occurs twice in an object",
    ),
    "user_last": (
        line(turns(("user", "x"))),
        "the last message is the user's; it must be the assistant's",
    ),
    "surrogate_in_a_call": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": '  # noqa: E501
        b'[{"function": {"name": "f", "arguments": {"x": "\\ud83d"}}}]}]}',
        "messages[1]: tool_calls",
    ),
    "huge_number": (b'{"messages": ' + b"1" * 5000 + b"}", "broken JSON: Exceeds the limit"),
    "image": (
        line(turns(("user", [{"type": "image", "url": "x"}]), ("assistant", "x"))),
        "messages[0]: content holds {'type': 'image', 'url': 'x'}; only text parts can be trained",
    ),
    "train": (
        line(
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b", "train": "no"},
                ]
            }
        ),
        "messages[1]: 'train' must be true or false, not 'no'",
    ),
    "nothing_trained": (
        line(
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b", "train": False},
                ]
            }
        ),
        "no token is trained",
    ),
    "tools": (
        line({**turns(("user", "a"), ("assistant", "b")), "tools": "{"}),
        "'tools' is no JSON: '{'",
    ),
}

#: Whole files.
BAD_FILES: dict[str, tuple[str, bytes | None, str]] = {
    "absent": ("a.jsonl", None, "a.jsonl: no such file"),
    "unknown_kind": (
        "a.xlsx",
        b"x",
        "a.xlsx: unknown kind of file; data.train takes .jsonl, .ndjson, .json, .csv",
    ),
    "empty": ("a.jsonl", b"", "a.jsonl: the file has no rows"),
    "blank_lines": ("a.jsonl", b"\n \n\n", "a.jsonl: the file has no rows"),
    "header_only": ("a.csv", b"instruction,output\n", "a.csv: the file has no rows"),
    "one_object": ("a.json", b'"x"', "a.json:1: must hold a list of rows, or one row per line"),
    "cut_list": (
        "a.json",
        b'[\n{"instruction": "x"},\n{"instr',
        "a.json:3: broken JSON at column 2",
    ),
    "two_lists": (
        "a.json",
        b'[{"text": "a"}]\n[{"text": "b"}]',
        "a.json:1: there is text after the list",
    ),
    "deep_list": ("a.json", b"[" * 100_000, "a.json:1: broken JSON"),
    "unknown_fields": (
        "a.jsonl",
        b'{"question": "x"}',
        "a.jsonl:1: cannot tell the format by the fields question",
    ),
    "no_parquet": ("a.parquet", b"no parquet", "a.parquet: not a Parquet file that pyarrow reads"),
    "no_arrow": ("a.arrow", b"no arrow at all", "a.arrow: not an Arrow file that pyarrow reads"),
    "cut_gzip": (
        "a.jsonl.gz",
        gzip.compress(line(GOOD) * 5000)[:-20],
        "a.jsonl.gz: cannot be read",
    ),
    "no_gzip": ("a.jsonl.gz", b"plain", "a.jsonl.gz: cannot be read"),
    "wide_csv": (
        "a.csv",
        b"instruction,output\na,b\nc,d,e\n",
        "a.csv:3: more columns than the header names",
    ),
    "latin1_csv": ("a.csv", b"instruction,output\na,b\n\xe4,x\n", "a.csv:3: not UTF-8 (byte 0xe4)"),
    "open_quote": ("a.csv", b'instruction,output\n"a,b\n', "a.csv:2: unexpected end of data"),
    "mixed_labels": (
        "a.jsonl",
        b'{"text": "a", "label": "pos"}\n{"text": "b", "label": 1}\n',
        "a.jsonl:2: mixed label types: 1 is a number (1 rows), but 'pos' in",
    ),
    "no_label": (
        "a.jsonl",
        b'{"text": "a", "label": 1}\n{"text": "c", "label": 0}\n{"text": "b"}\n',
        "a.jsonl:3: the field 'label' is missing",
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def prepare(tokenizer: Any, cache: Path, source: Path, **values: Any) -> Any:
    return prepare_data(
        DataConfig(train=str(source), **{"max_seq_length": 128, "val_set_size": 0, **values}),
        tokenizer,
        1,
        cache,
    )


@pytest.mark.parametrize("name", [*BAD_ROWS, *BAD_CHATS])
def test_a_bad_row_is_refused_or_skipped_by_its_line(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    content, message = {**BAD_ROWS, **BAD_CHATS}[name]
    good = line(GOOD if name in BAD_ROWS else turns(("user", "a"), ("assistant", "b")))
    source = tmp_path / "a.jsonl"
    source.write_bytes(good + b"\n\n" + content + b"\n" + good + b"\n")
    with pytest.raises(DataError) as caught:
        prepare(tokenizer, tmp_path, source)
    first = str(caught.value).splitlines()[0]
    assert first.startswith(f"{source}:3: ")
    assert message in first
    assert "data.on_bad_row=skip" in str(caught.value)
    assert caught.value.exit_code == 4

    data = prepare(tokenizer, tmp_path, source, on_bad_row=OnBadRow.skip)
    assert (data.train.rows, data.train.skipped) == (2, 1)
    (problem,) = read_problems(data)
    assert (problem.file, problem.line) == (str(source), 3)
    assert len(open_rows(data, "train")) == 2


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused(name: str, tokenizer: Any, tmp_path: Path) -> None:
    file, content, message = BAD_FILES[name]
    source = tmp_path / file
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(DataError) as caught:
        prepare(tokenizer, tmp_path, source)
    assert str(caught.value).startswith(f"{tmp_path}/{message}")
    left = [path for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".part")]
    assert not left, "nothing half made is left"


def test_there_are_enough_of_them() -> None:
    assert len({**BAD_ROWS, **BAD_CHATS, **BAD_FILES}) >= 25


def test_kinds_of_problems_are_counted_with_the_first_place_of_each(
    tokenizer: Any, tmp_path: Path
) -> None:
    source = tmp_path / "a.jsonl"
    rows = [
        GOOD,
        {**GOOD, "output": ""},
        {"instruction": "x"},
        {**GOOD, "output": ""},
        {**GOOD, "output": ""},
    ]
    source.write_bytes(b"\n".join(map(line, rows)))
    with pytest.raises(DataError) as caught:
        prepare(tokenizer, tmp_path, source)
    assert str(caught.value).splitlines()[:3] == [
        "problems in the data:",
        f"  {source}:2: the field 'output' is empty (3 like it)",
        f"  {source}:3: the field 'output' is missing (the row has: instruction)",
    ]


def test_a_file_of_nothing_but_bad_rows_is_an_error_even_where_they_are_skipped(
    tokenizer: Any, tmp_path: Path
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(line({**GOOD, "output": ""}))
    with pytest.raises(
        DataError, match=r"a.jsonl:1: the field 'output' is empty\nNo row of data.train="
    ):
        prepare(tokenizer, tmp_path, source, on_bad_row=OnBadRow.skip)


def test_validation_rows_that_are_trained_on_are_found(tokenizer: Any, tmp_path: Path) -> None:
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    rows = [{"instruction": f"question {number}", "output": "x"} for number in range(10)]
    train.write_bytes(b"\n".join(map(line, rows)))
    held_out.write_bytes(b"\n".join(map(line, [GOOD, rows[3], rows[7]])))
    with pytest.raises(DataError) as caught:
        prepare(tokenizer, tmp_path, train, eval=str(held_out))
    assert (
        f"{held_out}:2: the validation row is among the training rows too ({train}:4) (2 like it)"
        in str(caught.value)
    )
    data = prepare(tokenizer, tmp_path, train, eval=str(held_out), on_bad_row=OnBadRow.skip)
    assert data.eval is not None
    assert (data.train.rows, data.eval.rows) == (10, 1)


def test_more_over_long_rows_than_stated_are_refused_with_the_length_that_would_do(
    tokenizer: Any, tmp_path: Path
) -> None:
    source = tmp_path / "a.jsonl"
    rows = [
        {"instruction": f"q {number}", "output": "word " * (80 if number < 4 else 2)}
        for number in range(20)
    ]
    source.write_bytes(b"\n".join(map(line, rows)))
    with pytest.raises(DataError) as caught:
        prepare(tokenizer, tmp_path, source)
    assert (
        "4 of 20 rows (20.0%) are dropped because they are longer than data.max_seq_length=128"
        in str(caught.value)
    )
    enough = int(str(caught.value).split("data.max_seq_length=")[2].split()[0])
    assert prepare(tokenizer, tmp_path, source, max_seq_length=enough).train.dropped <= 2
    assert prepare(tokenizer, tmp_path, source, max_overlong_share=0.2).train.dropped == 4

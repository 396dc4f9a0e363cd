"""Rows of every format become one type."""

from __future__ import annotations

from typing import Any

import pytest

from llmtune.data.formats.format import FORMATS, detect_format
from llmtune.data.rows.values import rename
from llmtune.task.labels import Tags

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}

#: Format, row, what comes out: (role, text) of each message.
ROWS: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    (
        "alpaca",
        {
            "instruction": "Add",
            "input": "1 2",
            "output": "3",
            "system": "Be brief.",
            "history": [["Hi", "Hello"]],
        },
        [
            ("system", "Be brief."),
            ("user", "Hi"),
            ("assistant", "Hello"),
            ("user", "Add\n\n1 2"),
            ("assistant", "3"),
        ],
    ),
    (
        "alpaca",
        {"instruction": "Add", "input": None, "output": "3"},
        [("user", "Add"), ("assistant", "3")],
    ),
    (
        "sharegpt",
        {
            "system": "S",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        },
        [("system", "S"), ("user", "Hi"), ("assistant", "Hello")],
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "1+1?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "Two."},
            ],
            "tools": '[{"name": "add"}]',
        },
        [("user", "1+1?"), ("assistant", ""), ("tool", "2"), ("assistant", "Two.")],
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "S"},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                },
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "2", "tool_call_id": "x"},
                {"role": "assistant", "content": "Two.", "weight": 1},
            ]
        },
        [("system", "S"), ("user", "ab"), ("assistant", ""), ("tool", "2"), ("assistant", "Two.")],
    ),
    (
        "prompt_completion",
        {"prompt": "2+2=", "completion": "4"},
        [("user", "2+2="), ("assistant", "4")],
    ),
    (
        "prompt_completion",
        {
            "prompt": [{"role": "user", "content": "Hi"}],
            "completion": [{"role": "assistant", "content": "Hello"}],
        },
        [("user", "Hi"), ("assistant", "Hello")],
    ),
    ("text", {"text": "Once"}, [("assistant", "Once")]),
    ("classification", {"text": "good", "label": "pos"}, [("user", "good")]),
    (
        "classification",
        {"sentence1": "a", "sentence2": "b", "label": 0},
        [("user", "a"), ("user", "b")],
    ),
    (
        "token_classification",
        {"tokens": ["Ada", "of", "London"], "tags": ["B-PER", "O", "B-LOC"]},
        [("user", "Ada of London")],
    ),
]


@pytest.mark.parametrize(
    ("data_format", "row", "expected"), ROWS, ids=[f"{row[0]}-{n}" for n, row in enumerate(ROWS)]
)
def test_a_row_is_recognized_and_read(
    data_format: str, row: Any, expected: list[tuple[str, str]]
) -> None:
    assert detect_format(row).name == data_format
    conversation = FORMATS.find(data_format).read(row)
    assert [(message.role.value, message.content) for message in conversation.messages] == expected


def test_every_format_has_a_row_here() -> None:
    assert {row[0] for row in ROWS} == set(FORMATS.list())


def test_what_a_template_needs_beside_the_text_is_kept() -> None:
    called = FORMATS.find("messages").read(ROWS[4][1])
    assert called.messages[2].extra == {"tool_calls": [CALL]}
    assert called.messages[3].extra == {"tool_call_id": "x"}
    shared = FORMATS.find("sharegpt").read(ROWS[3][1])
    assert shared.messages[1].extra == {"tool_calls": [CALL]}
    assert shared.tools == ({"name": "add"},)


def test_messages_can_be_left_untrained() -> None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "train": False},
    ]
    more = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    row = FORMATS.find("messages").read({"messages": [*turns, *more]})
    assert [message.train for message in row.messages] == [None, False, None, None]
    plain = [{key: turn[key] for key in ("role", "content")} for turn in [*turns, *more]]
    row = FORMATS.find("prompt_completion").read({"prompt": plain[:3], "completion": plain[3:]})
    assert [message.train for message in row.messages] == [None, False, None, None], (
        "only the completion is trained"
    )


def test_nulls_and_weights_of_completions_are_understood() -> None:
    turns = [
        ("user", "a", None),
        ("assistant", "b", None),
        ("user", "c", None),
        ("assistant", "d", 0),
        ("assistant", "e", 1),
    ]
    messages = [
        {"role": role, "content": text, "train": None, "weight": weight}
        for role, text, weight in turns
    ]
    row = FORMATS.find("prompt_completion").read(
        {"prompt": messages[:3], "completion": messages[3:]}
    )
    assert [message.train for message in row.messages] == [None, False, None, False, True]


def test_labels_keep_their_names() -> None:
    read = FORMATS.find("classification").read
    assert read({"text": "good", "label": "pos"}).label == "pos"
    assert read({"text": "good", "label": 0}).label == 0
    assert read({"text": "good", "label": 3.5}).label == 3.5
    assert read({"text": "good", "label": ["new", "long"]}).label == ("new", "long")
    assert read({"text": "good", "label": []}).label == ()
    tags = FORMATS.find("token_classification").read({"tokens": ["a", "b"], "tags": [1, 0]})
    assert (tags.label, tags.words) == (Tags((1, 0)), ("a", "b"))


def test_columns_can_have_other_names() -> None:
    row = rename(
        {"question": "Add", "answer": "3", "output": "x"},
        {"instruction": "question", "output": "answer"},
    )
    assert detect_format(row).name == "alpaca"
    assert [message.content for message in FORMATS.find("alpaca").read(row).messages] == [
        "Add",
        "3",
    ]

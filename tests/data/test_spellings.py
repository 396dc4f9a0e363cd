"""What people write in other ways than the formats' own, and what is empty on purpose: read all the
same, or said why not.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmtune.config.groups.data import DataConfig
from llmtune.data.formats.format import detect_format
from llmtune.data.formats.recipe import Recipe
from llmtune.data.prepare import prepare_data
from llmtune.data.prepared_data import open_rows
from llmtune.data.report.statistics import show_row
from llmtune.data.rows.conversation import Conversation
from llmtune.data.rows.problems import RowError
from llmtune.data.rows.turns import ROLES
from llmtune.data.tokenize.chat_template import load_chat_template

CALL = {"name": "add", "arguments": {"a": 1}}
MORE = {"name": "now", "arguments": {}}

#: A template of a model that thinks: thoughts stand before the last answer only.
THINKS = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}{%- if m.reasoning_content and loop.last -%}"  # noqa: E501
    "{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{%- endif -%}{{ m.content + '<|im_end|>\n' }}{%- endfor -%}"  # noqa: E501
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def read(row: dict[str, Any], ignore: frozenset[str] = frozenset(), **fields: str) -> Conversation:
    data_format = detect_format({**row, **fields}).name
    conversation, unknown = Recipe(data_format, fields, ignore).read(row)
    assert not unknown
    return conversation


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role.value, message.content) for message in conversation.messages]


TALK = [("user", "hi"), ("assistant", "hello")]
OWN = [{"role": role, "content": text} for role, text in TALK]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


@pytest.mark.parametrize(
    "turns", [OWN, SHARED, [OWN[0], SHARED[1]], [{**OWN[0], **SHARED[0]}, OWN[1]]]
)
@pytest.mark.parametrize(
    "write", [list, json.dumps, lambda turns: list(map(json.dumps, turns)), lambda t: f" {t!s}"]
)
@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_a_conversation_is_read_however_it_is_spelled(field: str, write: Any, turns: Any) -> None:
    written = write(turns)
    if isinstance(written, str) and "'" in written:
        with pytest.raises(
            RowError, match=f"'{field}' is text that begins like a list, and no JSON .*json.dumps"
        ):
            read({field: written})
        return
    assert said(read({field: written})) == TALK


@pytest.mark.parametrize("write", [list, json.dumps])
@pytest.mark.parametrize("turns", [OWN, SHARED])
def test_so_are_the_lists_of_prompts_and_completions(turns: Any, write: Any) -> None:
    row = {"prompt": write([*turns, turns[0]]), "completion": write(turns[1:])}
    conversation = read(row)
    assert said(conversation) == [*TALK, *TALK]
    assert [message.train for message in conversation.messages] == [None, False, None, None], (
        "only the completion"
    )


@pytest.mark.parametrize("prompt", ["[1, 2", '["a"]', json.dumps(OWN)])
def test_a_prompt_that_is_a_list_by_itself_stays_text(prompt: str) -> None:
    conversation = read({"prompt": prompt, "completion": "x"})
    assert conversation.plain
    assert conversation.messages[0].content == prompt


@pytest.mark.parametrize("history", ["", None, [], "[]"])
def test_a_history_may_be_empty_in_all_ways(history: Any) -> None:
    assert said(read({"instruction": "hi", "output": "hello", "history": history})) == TALK


def test_a_history_may_be_json() -> None:
    row = {"instruction": "hi", "output": "hello", "history": '[["a", "b"]]'}
    assert said(read(row)) == [("user", "a"), ("assistant", "b"), *TALK]


def test_ignored_fields_are_ignored_in_json_too() -> None:
    turns = [OWN[0], {**OWN[1], "score": 3}]
    with pytest.raises(RowError, match="the field 'score'"):
        read({"messages": json.dumps(turns)})
    assert said(read({"messages": json.dumps(turns)}, ignore=frozenset({"score"}))) == TALK
    assert (
        said(
            read(
                {"talk": json.dumps(turns)},
                ignore=frozenset({"score", "messages"}),
                messages="talk",
            )
        )
        == TALK
    )


@pytest.mark.parametrize("spell", [str.upper, str.title, str.capitalize, lambda name: f" {name} "])
@pytest.mark.parametrize("name", sorted(set(ROLES) - {"function_call", "tool_call"}))
def test_capitals_of_speakers_mean_nothing(name: str, spell: Any) -> None:
    turns = [{"from": spell(name), "value": "x"}, {"from": spell("gpt"), "value": "y"}]
    assert read({"conversations": turns}).messages[0].role is ROLES[name]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"role": "user", "content": "a", "value": "b"},
            r"messages\[0\]: 'content' and 'value' say different things",
        ),
        (
            {"role": "user", "from": "gpt", "content": "a"},
            r"messages\[0\]: 'role' and 'from' say different things",
        ),
        ({"role": "user", "content": ""}, r"messages\[0\]: the field 'content' is empty"),
        (
            {"from": "human", "value": " "},
            r"messages\[0\]: the field 'value' has nothing but white space",
        ),
        ({"role": "system", "text": "Be kind."}, r"messages\[0\]: the field 'content' is missing"),
        ({"role": "tool", "result": "2"}, r"messages\[0\]: the field 'content' is missing"),
        (
            {"role": "assistant", "content": "", "train": True},
            r"messages\[0\]: the field 'content' is empty",
        ),
    ],
)
def test_what_is_lost_or_contradicts_itself_is_refused(entry: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        read({"messages": [entry, OWN[1]]})


@pytest.mark.parametrize("content", ["", None, " \n", [], [{"type": "text", "text": ""}]])
def test_a_system_prompt_a_result_and_the_words_beside_a_thought_may_be_empty(content: Any) -> None:
    call = {"role": "assistant", "content": content, "tool_calls": [{"function": CALL}]}
    thought = {"role": "assistant", "content": content, "reasoning_content": "Hm."}
    turns = [
        {"role": "system", "content": content},
        OWN[0],
        call,
        {"role": "tool", "content": content},
        thought,
    ]
    empty = content if isinstance(content, str) else ""
    conversation = read({"messages": turns})
    assert [message.content for message in conversation.messages] == [
        empty,
        "hi",
        empty,
        empty,
        empty,
    ]
    assert conversation.messages[4].extra["reasoning_content"] == "Hm."


def test_what_arrow_leaves_out_is_empty_too() -> None:
    turns = [
        {"role": "system"},
        OWN[0],
        {"role": "tool", "tool_call_id": "x"},
        {"role": "assistant", "thinking": "Hm."},
    ]
    assert [message.content for message in read({"messages": turns}).messages] == ["", "hi", "", ""]


@pytest.mark.parametrize(
    "turns",
    [
        [("function_call", json.dumps([CALL, MORE]))],
        [("function_call", f"{json.dumps(CALL)}\n{json.dumps(MORE)}\n")],
        [("function_call", f" {json.dumps(CALL)}, {json.dumps(MORE)}")],
        [("Function_Call", json.dumps(CALL)), ("function_call", json.dumps(MORE))],
        [("tool_call", json.dumps(CALL)), ("tool_call", json.dumps({"name": "now"}))],
        [("tool_call", json.dumps([{"type": "function", "function": CALL}, {"function": MORE}]))],
    ],
)
def test_several_calls_are_one_turn_however_they_are_written(turns: list[tuple[str, str]]) -> None:
    asked = [("human", "hi"), *turns, ("observation", "1"), ("tool_response", ""), ("gpt", "Two.")]
    row = {"conversations": [{"from": speaker, "value": text} for speaker, text in asked]}
    messages = read(row).messages
    assert [message.role.value for message in messages] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]
    assert [call["function"] for call in messages[1].extra["tool_calls"]] == [CALL, MORE]


def test_calls_that_are_trained_and_not_stay_apart() -> None:
    calls = [
        {"from": "function_call", "value": json.dumps(CALL), "train": train}
        for train in (False, True)
    ]
    messages = read(
        {"conversations": [SHARED[0], *calls, {"from": "tool", "value": "2"}, SHARED[1]]}
    ).messages
    assert [message.train for message in messages] == [None, False, True, None, None]


@pytest.mark.parametrize(
    "text", ["add(1)", "", "[]", "1", '{"tool": "add"}', json.dumps(CALL) + " and more"]
)
def test_what_is_no_call_is_refused(text: str) -> None:
    row = {"conversations": [SHARED[0], {"from": "function_call", "value": text}, SHARED[1]]}
    with pytest.raises(RowError, match=r"conversations\[1\]: "):
        read(row)


def shown(
    rows: list[dict[str, Any]], template: str, tiny_model: Path, folder: Path, **values: Any
) -> list[str]:
    """The rows as they are trained, trained text in brackets."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepare_data(
        DataConfig(train=str(file), val_set_size=0, **values), tokenizer, 1, folder / "cache"
    )
    opened = open_rows(data, "train")
    pieces = [show_row(opened, number, tokenizer) for number in range(len(opened))]
    return sorted("".join(f"[[{p.text}]]" if p.trained else p.text for p in row) for row in pieces)


def test_an_empty_system_prompt_is_rendered_as_one(tiny_model: Path, tmp_path: Path) -> None:
    template = load_chat_template("qwen")
    assert template is not None
    (text,) = shown(
        [{"messages": [{"role": "system", "content": ""}, *OWN]}], template, tiny_model, tmp_path
    )
    asked = (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text == f"{asked}[[hello<|im_end|>]]"


def test_an_answer_that_is_only_reasoning_is_trained(tiny_model: Path, tmp_path: Path) -> None:
    row = {"messages": [OWN[0], {"role": "assistant", "content": "", "reasoning_content": "Hm."}]}
    (text,) = shown([row], THINKS, tiny_model, tmp_path)
    assert text.endswith("<|im_start|>assistant\n[[<think>\nHm.\n</think>\n\n<|im_end|>]]")


def test_a_table_of_text_holds_conversations(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "talk"])
        writer.writerows(
            [number, json.dumps([{**OWN[0], "content": f"hi {number}"}, OWN[1]])]
            for number in range(4)
        )
    source = {"path": str(path), "fields": {"messages": "talk"}}
    config = DataConfig(train=source, val_set_size=0, format="auto")
    data = prepare_data(config, AutoTokenizer.from_pretrained(tiny_model), 1, tmp_path / "cache")
    assert data.train.rows == 4
    assert data.unknown_fields == []

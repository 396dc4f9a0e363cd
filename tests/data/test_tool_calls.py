"""Calls of tools come in many forms, and become one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.data.formats.recipe import Recipe
from llmtune.data.rows.problems import RowError

ASKED = {"role": "user", "content": "a"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def read(answer: dict[str, Any], **more: Any) -> Any:
    conversation, unknown = Recipe("messages", {}).read(
        {"messages": [ASKED, {"role": "assistant", **answer}], **more}
    )
    assert not unknown
    return conversation


@pytest.mark.parametrize(
    "answer",
    [
        {"content": None, "tool_calls": [CALL]},
        {"tool_calls": [CALL]},
        {"content": "", "tool_calls": json.dumps([CALL])},
        {"content": "", "tool_calls": [json.dumps(CALL)]},
        {"content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]},
        {"content": "", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {
            "content": "",
            "tool_calls": [],
            "function_call": {"name": "add", "arguments": '{"a": 1}'},
        },
    ],
)
def test_every_form_of_a_call_is_the_same_call(answer: dict[str, Any]) -> None:
    message = read(answer).messages[1]
    assert (message.content, message.extra) == ("", {"tool_calls": [CALL]})


def test_the_calls_of_a_turn_are_one_or_several() -> None:
    def shared(text: str) -> Any:
        turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": text}]
        return (
            Recipe("sharegpt", {}).read({"conversations": turns})[0].messages[1].extra["tool_calls"]
        )

    assert shared('{"name": "add", "arguments": {"a": 1}}') == [CALL]
    assert shared('{"name": "add", "arguments": "{\\"a\\": 1}"}') == [CALL]
    assert shared(
        '[{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 1}}]'
    ) == [CALL, CALL]


@pytest.mark.parametrize(
    ("given_as", "expected"), [(None, {}), ("", {}), (" ", {}), ("{}", {}), ({}, {})]
)
def test_a_call_may_have_no_arguments(given_as: Any, expected: dict[str, Any]) -> None:
    call = {"id": "x", "function": {"name": "now", "arguments": given_as}}
    (found,) = read({"content": "", "tool_calls": [call]}).messages[1].extra["tool_calls"]
    assert found == {
        "id": "x",
        "type": "function",
        "function": {"name": "now", "arguments": expected},
    }


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=4,
        ),
    )
)
def test_arguments_as_text_are_those_of_the_mapping(arguments: dict[str, Any]) -> None:
    text, mapping = (
        read({"content": "", "tool_calls": [{"function": {"name": "f", "arguments": form}}]})
        for form in (json.dumps(arguments), arguments)
    )
    assert text == mapping


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ("{", "messages[1]: 'tool_calls' is no JSON: '{'"),
        (3, "messages[1]: 'tool_calls' must be a list, not 3"),
        (["x"], "messages[1]: a tool call is no JSON: 'x'"),
        ([3], "messages[1]: a tool call must be {function: {name, arguments}}, not 3"),
        ([{"function": {}}], "messages[1]: a tool call must be {function: {name, arguments}}, not"),
        (
            [{"function": {"name": "f", "arguments": "{"}}],
            "messages[1]: the arguments of the call of 'f' are no JSON: '{'",
        ),
        (
            [{"function": {"name": "f", "arguments": "[1]"}}],
            "the arguments of the call of 'f' must be a JSON object, not '[1]'",
        ),
        (
            [{"name": "f", "parameters": {}}],
            "the call of 'f' has the field 'parameters', which is not read",
        ),
    ],
)
def test_what_is_no_call_is_refused(calls: Any, message: str) -> None:
    with pytest.raises(RowError) as caught:
        read({"content": "", "tool_calls": calls})
    assert message in str(caught.value)


def test_functions_are_tools_as_the_older_api_had_them() -> None:
    assert read({"content": "b"}, functions=[{"name": "add"}]).tools == (
        {"type": "function", "function": {"name": "add"}},
    )
    assert read({"content": "b"}, tools=" ").tools == ()
    with pytest.raises(RowError, match="the row has 'tools' and 'functions'; keep one of them"):
        read({"content": "b"}, functions=[{"name": "add"}], tools=[CALL])


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_has_every_name_by_which_templates_ask_for_it(name: str) -> None:
    extra = read({"content": "b", name: "because"}).messages[1].extra
    assert {"reasoning_content": "because", "thinking": "because"}.items() <= extra.items()
    assert set(extra.values()) == {"because"}


def test_reasoning_is_one_text() -> None:
    assert (
        read({"content": "b", "reasoning": "x", "thinking": "x"})
        .messages[1]
        .extra["reasoning_content"]
        == "x"
    )
    with pytest.raises(RowError, match="reasoning and thinking say different things"):
        read({"content": "b", "reasoning": "x", "thinking": "y"})
    with pytest.raises(RowError, match="'thinking' must be text, not True"):
        read({"content": "b", "thinking": True})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            {"function": {"name": "add"}, "arguments": {"a": 1}},
            "has the field 'arguments' beside its function",
        ),
        (
            {"function": {"name": "add"}, "arguments": '{"a": 1}'},
            "has the field 'arguments' beside its function",
        ),
        (
            {"function": {"name": "add"}, "parameters": {"a": 1}},
            "has the field 'parameters' beside its function",
        ),
        (
            {"function": {"name": "add"}, "input": {"a": 1}},
            "has the field 'input' beside its function",
        ),
        (
            {"name": "sub", "function": {"name": "add", "arguments": {}}},
            "has the field 'name' beside its function",
        ),
        (
            {"function": {"name": "add", "function": {"arguments": {"a": 1}}}},
            "has the field 'function', which is not",
        ),
        (
            {"function": {"name": "add", "parameters": {"a": 1}}},
            "has the field 'parameters', which is not read",
        ),
        ({"name": "add", "input": "a"}, "has the field 'input', which is not read"),
        (
            {"name": "add", "arguments": '{"a": 1, "a": 2}'},
            "the name 'a' occurs twice in an object",
        ),
        ('{"name": "add", "name": "sub"}', "the name 'name' occurs twice in an object"),
    ],
)
def test_nothing_of_a_call_is_dropped(call: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        read({"content": "", "tool_calls": [call]})


def test_fields_of_a_call_that_hold_nothing_do_not_matter() -> None:
    """As exports write them that know one set of fields for all rows."""
    function = {"name": "add", "arguments": {"a": 1}, "parameters": None, "function": None}
    call = {"type": "function", "function": function, "name": None, "arguments": "", "input": {}}
    assert read({"content": "", "tool_calls": [call]}).messages[1].extra == {"tool_calls": [CALL]}

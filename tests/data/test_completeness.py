"""What a row says stands in its text, or the row is refused: over templates, kinds of content, and
made-up rows.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.data.formats.recipe import Recipe
from llmtune.data.rows.conversation import Conversation, Role
from llmtune.data.rows.problems import RowError
from llmtune.data.tokenize.chat_template import (
    ChatTemplate,
    ChatTemplates,
    check_chat_template,
    load_chat_template,
)
from llmtune.errors import ConfigError
from llmtune.model.random_tokenizer import build_tokenizer

PROMPT = "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"


def over_messages(
    answer: str,
    result: str = "{{ '<|im_start|>tool\n' + m.content + '<|im_end|>\n' }}",
    before: str = "",
) -> str:
    """A template that writes answers and results so, and the rest as ChatML."""
    return (
        f"{before}{{%- for m in messages -%}}{{%- if m.role == 'assistant' -%}}{{{{ '<|im_start|>assistant\n' }}}}{answer}"  # noqa: E501
        f"{{{{ '<|im_end|>\n' }}}}{{%- elif m.role == 'tool' -%}}{result}{{%- else -%}}"
        f"{{{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}}}{{%- endif -%}}{{%- endfor -%}}{PROMPT}"  # noqa: E501
    )


TOOLS = (
    "{%- if tools -%}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{%- endif -%}"
)
CALLS = "{%- for c in m.tool_calls or [] -%}{%- set f = c.function -%}CALL{%- endfor -%}"
SAID = "{{ m.content }}"
THOUGHT = "{%- if m.reasoning_content -%}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{%- endif -%}"  # noqa: E501


def calls(one: str) -> str:
    return CALLS.replace("CALL", one)


JSON_CALL = calls("{{ '\n' + {'name': f.name, 'arguments': f.arguments} | tojson }}")

#: Templates of the kinds in use.
TEMPLATES: dict[str, str] = {
    **{
        name: str(load_chat_template(name))
        for name in ("chatml", "llama2", "llama3", "mistral", "qwen")
    },
    "json": over_messages(SAID + JSON_CALL, before=TOOLS),
    "json and thoughts": over_messages(THOUGHT + SAID + JSON_CALL, before=TOOLS),
    "marked": over_messages(
        "{% generation %}" + THOUGHT + SAID + JSON_CALL + "{% endgeneration %}", before=TOOLS
    ),
    "arguments as text": over_messages(
        SAID + calls("{{ '\n' + f.name + ' ```json\n' + f.arguments + '```' }}"), before=TOOLS
    ),
    "arguments as they are": over_messages(
        SAID + calls("{{ '\n' + f.name + ' ' }}{{ f.arguments }}"), before=TOOLS
    ),
    "parameters": over_messages(
        SAID
        + calls(
            "{{ '\n<function=' + f.name + '>' }}{%- for k, v in f.arguments | items -%}"
            "{{ '\n<parameter=' + k + '>\n' + (v if v is string else v | tojson) + '\n</parameter>' }}{%- endfor -%}"  # noqa: E501
        ),
        before=TOOLS,
    ),
    "quoted results": over_messages(
        SAID + JSON_CALL,
        "{{ '<|im_start|>tool\n' + {'content': m.content} | tojson + '<|im_end|>\n' }}",
        TOOLS,
    ),
    "html": over_messages(
        SAID + JSON_CALL, "{{ '<|im_start|>tool\n' + m.content | e + '<|im_end|>\n' }}", TOOLS
    ),
    "answers as html": over_messages("{{ m.content | e }}" + JSON_CALL, before=TOOLS),
    "only names of tools": over_messages(
        SAID + JSON_CALL,
        before="{%- for t in tools or [] -%}{{ t.function.name + '\n' }}{%- endfor -%}",
    ),
    "no results": over_messages(SAID + JSON_CALL, "", TOOLS),
    "no names of calls": over_messages(SAID + calls("{{ f.arguments | tojson }}"), before=TOOLS),
    "no arguments": over_messages(SAID + calls("{{ f.name }}"), before=TOOLS),
    "no keys": over_messages(
        SAID + calls("{{ f.name + f.arguments.values() | list | tojson }}"), before=TOOLS
    ),
    "calls instead of words": over_messages(
        "{%- if not m.tool_calls -%}" + SAID + "{%- endif -%}" + JSON_CALL, before=TOOLS
    ),
    "first call": over_messages(
        SAID + JSON_CALL.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"), before=TOOLS
    ),
    "cut thoughts": over_messages(
        "{{ m.content.split('</think>')[-1] }}" + JSON_CALL, before=TOOLS
    ),
    "moved thoughts": over_messages(
        "{%- if '</think>' in m.content -%}{{ '<think>\n' + m.content.split('</think>')[0].split('<think>')[-1].strip() + "  # noqa: E501
        "'\n</think>\n\n' + m.content.split('</think>')[-1].strip() }}{%- else -%}"
        + SAID
        + "{%- endif -%}"
        + JSON_CALL,
        before=TOOLS,
    ),
    "first 12 letters": over_messages("{{ m.content[:12] }}" + JSON_CALL, before=TOOLS),
}

ASKED = {"role": "user", "content": "question zero"}
TOOL = {
    "type": "function",
    "function": {
        "name": "clockname",
        "description": "clockdescription",
        "parameters": {
            "type": "object",
            "properties": {
                "townproperty": {
                    "type": "string",
                    "description": "towndescription",
                    "enum": ["choiceone", "choicetwo"],
                }
            },
        },
    },
}


def call(name: str = "clockname", arguments: Any = None, number: int = 0) -> dict[str, Any]:
    return {
        "id": f"callcall{number}",
        "type": "function",
        "function": {
            "name": name,
            "arguments": {"townkey": "townvalue"} if arguments is None else arguments,
        },
    }


def answer(content: str | None = "the answer", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


RESULT = {"role": "tool", "tool_call_id": "callcall0", "name": "clockname", "content": "result"}

#: Row, and what has to stand in its text.
ROWS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "words": ({"messages": [ASKED, answer()]}, ["question zero", "the answer"]),
    "system": (
        {"messages": [{"role": "system", "content": "be brief"}, ASKED, answer()]},
        ["be brief", "question zero", "the answer"],
    ),
    "call": (
        {"messages": [ASKED, answer(None, tool_calls=[call()])]},
        ["clockname", "townkey", "townvalue"],
    ),
    "two calls": (
        {
            "messages": [
                ASKED,
                answer(None, tool_calls=[call(), call("secondname", {"secondkey": 71}, 1)]),
            ]
        },
        ["clockname", "townvalue", "secondname", "secondkey", "71"],
    ),
    "words and a call": (
        {"messages": [ASKED, answer("let me see", tool_calls=[call()])]},
        ["let me see", "clockname", "townkey", "townvalue"],
    ),
    "result": (
        {
            "messages": [
                ASKED,
                answer(None, tool_calls=[call()]),
                {**RESULT, "content": "resulttext"},
                answer(),
            ]
        },
        ["clockname", "townkey", "townvalue", "resulttext", "the answer"],
    ),
    "tools": (
        {"messages": [ASKED, answer()], "tools": [TOOL]},
        [
            "clockname",
            "clockdescription",
            "townproperty",
            "towndescription",
            "choiceone",
            "choicetwo",
        ],
    ),
    "reasoning": (
        {"messages": [ASKED, answer(reasoning="thoughttext")]},
        ["thoughttext", "the answer"],
    ),
    "reasoning in tags": (
        {"messages": [ASKED, answer("<think>\nthoughttext\n</think>\n\nthe answer")]},
        ["<think>", "thoughttext", "</think>", "the answer"],
    ),
    "empty content": (
        {"messages": [ASKED, answer("", tool_calls=[call()])]},
        ["clockname", "townkey", "townvalue"],
    ),
    "short values": (
        {
            "messages": [
                ASKED,
                answer(None, tool_calls=[call("f", {"a": 1})]),
                {**RESULT, "name": "f", "content": "5"},
                answer(),
            ]
        },
        [],
    ),
    "short tools": (
        {"messages": [ASKED, answer()], "tools": [{"type": "function", "function": {"name": "f"}}]},
        [],
    ),
    "special characters": (
        {
            "messages": [
                {"role": "user", "content": "a \"b\" 'c' <d> & \\e\n\n  f\tß 日本 🙂"},
                answer("x\n    y  z <b>"),
            ]
        },
        ["日本 🙂", "x\n    y  z <b>"],
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(512)


def read(row: dict[str, Any]) -> Conversation:
    return Recipe("messages", {}).read(row)[0]


def template_of(tokenizer: Any, text: str) -> ChatTemplate:
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", ROWS)
def test_a_row_is_rendered_with_all_that_it_says_or_refused(
    name: str, kind: str, tokenizer: Any
) -> None:
    row, words = ROWS[kind]
    template = template_of(tokenizer, TEMPLATES[name])
    outcome = render(template, read(row))
    if isinstance(outcome, str):
        assert all(word in outcome for word in words)
        return
    reason = str(outcome)
    assert "the chat template leaves out" in reason or "the chat template refuses the row" in reason
    with contextlib.suppress(jinja2.TemplateError, TypeError):
        # What transformers makes of the row as it stands, where the template takes it so.
        messages = [{**message, "content": message["content"] or ""} for message in row["messages"]]
        reference = tokenizer.apply_chat_template(messages, tools=row.get("tools"), tokenize=False)
        assert not words or not all(word in reference for word in words), reason


def render(template: ChatTemplate, conversation: Conversation) -> str | RowError:
    try:
        text, spans = template.render(conversation)
    except RowError as error:
        return error
    assert len(spans) == sum(message.role is Role.assistant for message in conversation.messages)
    return text


#: Template, row, and the first thing that is missing.
LOST = [
    ("chatml", "call", "the call of 'clockname' in message 1 (assistant) ('clockname' and 2 more"),
    ("chatml", "tools", "the definition of the tool 'clockname' ('clockname' and 5 more"),
    ("chatml", "short tools", "the definition of the tool 'f' ('f')"),
    ("chatml", "reasoning", "the reasoning of message 1 (assistant) ('thoughttext')"),
    ("llama3", "result", "the call of 'clockname' in message 1 (assistant)"),
    ("qwen", "reasoning", "the reasoning of message 1 (assistant) ('thoughttext')"),
    (
        "only names of tools",
        "tools",
        "the definition of the tool 'clockname' ('clockdescription' and 4 more",
    ),
    ("no results", "result", "the content of message 2 (tool) ('resulttext')"),
    ("no results", "short values", "the content of message 2 (tool) ('5')"),
    ("no names of calls", "call", "the call of 'clockname' in message 1 (assistant) ('clockname')"),
    (
        "no names of calls",
        "short values",
        "the call of 'f' in message 1 (assistant) ('f' and 1 more",
    ),
    (
        "no arguments",
        "call",
        "the arguments of the call of 'clockname' in message 1 (assistant) ('townkey' and 1 more",
    ),
    (
        "no arguments",
        "short values",
        "the arguments of the call of 'f' in message 1 (assistant) ('a' and 1 more",
    ),
    (
        "no keys",
        "call",
        "the arguments of the call of 'clockname' in message 1 (assistant) ('townkey')",
    ),
    (
        "calls instead of words",
        "words and a call",
        "the content of message 1 (assistant) ('let me see')",
    ),
    (
        "first call",
        "two calls",
        "the call of 'secondname' in message 1 (assistant) ('secondname' and 2 more",
    ),
    (
        "cut thoughts",
        "reasoning in tags",
        "the reasoning of message 1 (assistant) ('thoughttext' and 2 more",
    ),
    (
        "first 12 letters",
        "special characters",
        "the content of message 1 (assistant) ('x\\n    y  z",
    ),
    ("answers as html", "reasoning in tags", "the reasoning of message 1 (assistant) ('<think>'"),
    ("answers as html", "special characters", "the content of message 1 (assistant)"),
    (
        "first 12 letters",
        "reasoning in tags",
        "the reasoning of message 1 (assistant) ('thoughttext' and 2 more",
    ),
]


@pytest.mark.parametrize(
    ("name", "kind", "missing"), LOST, ids=[f"{name}-{kind}" for name, kind, _ in LOST]
)
def test_what_is_lost_is_named_with_the_next_step(
    name: str, kind: str, missing: str, tokenizer: Any
) -> None:
    template = template_of(tokenizer, TEMPLATES[name])
    with pytest.raises(RowError) as caught:
        template.render(read(ROWS[kind][0]))
    assert f"the chat template leaves out {missing}" in str(caught.value)
    assert "; take a data.chat_template that writes" in str(caught.value)


TAKES_CALLS = ("arguments as text", "arguments as they are", "parameters", "quoted results")

#: Template, row: all of it is there.
KEPT = [
    *(("qwen", kind) for kind in ROWS if "reasoning" not in kind),
    *(("json and thoughts", kind) for kind in ROWS),
    *(("marked", kind) for kind in ROWS),
    *(("moved thoughts", kind) for kind in ("reasoning in tags", "words", "result")),
    *(
        (name, kind)
        for name in TAKES_CALLS
        for kind in (
            "result",
            "two calls",
            "short values",
            "tools",
            "short tools",
            "special characters",
        )
    ),
    *(("html", kind) for kind in ("special characters", "result")),
    *((name, "words") for name in TEMPLATES),
    *(
        (name, "special characters")
        for name in ("chatml", "llama2", "llama3", "mistral", "html", "qwen")
    ),
]


@pytest.mark.parametrize(("name", "kind"), KEPT, ids=[f"{name}-{kind}" for name, kind in KEPT])
def test_what_is_there_is_not_refused(name: str, kind: str, tokenizer: Any) -> None:
    text, _ = template_of(tokenizer, TEMPLATES[name]).render(read(ROWS[kind][0]))
    assert all(word in text for word in ROWS[kind][1])


def test_a_result_that_the_answer_repeats_is_missed_all_the_same(tokenizer: Any) -> None:
    row = {"messages": [ASKED, answer(None, tool_calls=[call()]), RESULT, answer("the result")]}
    with pytest.raises(
        RowError, match=r"leaves out the content of message 2 \(tool\) \('result'\)"
    ):
        template_of(tokenizer, TEMPLATES["no results"]).render(read(row))
    thought = {"messages": [ASKED, answer("<think>\nParis\n</think>\n\nParis")]}
    with pytest.raises(RowError, match=r"leaves out the reasoning of message 1 \(assistant\)"):
        template_of(tokenizer, TEMPLATES["cut thoughts"]).render(read(thought))


@pytest.mark.parametrize("name", ["json and thoughts", "marked"])
def test_reasoning_before_an_answer_that_is_not_trained_may_be_dropped(
    name: str, tokenizer: Any
) -> None:
    text = TEMPLATES[name].replace(
        "{%- if m.reasoning_content -%}", "{%- if m.reasoning_content and loop.last -%}"
    )
    turns = [
        ASKED,
        answer("first", reasoning="earlier thought", train=False),
        ASKED,
        answer("second", reasoning="a thought"),
    ]
    untrained, trained = (
        {"messages": [turns[0], {**turns[1], "train": train}, *turns[2:]]}
        for train in (False, True)
    )
    template = template_of(tokenizer, text)
    if name == "marked":
        rendered, spans = template.render(read(untrained))
        assert "a thought" in rendered
        assert "earlier thought" not in rendered
        assert [span.train for span in spans] == [False, True]
        with pytest.raises(RowError, match="leaves out the reasoning of message 1"):
            template.render(read(trained))
        return
    rendered, spans = template.render(read(untrained))
    assert "earlier thought" not in rendered
    (span,) = spans
    assert "a thought" in rendered[span.start : span.end]
    # The place of an answer that looks otherwise as the last one cannot be derived, which matters
    # where it is trained.
    with pytest.raises(
        RowError, match="writes the answer in message 1 with thinking where it is the last"
    ):
        template.render(read(trained))
    everything = ChatTemplate(tokenizer, text, every_answer=True)
    with pytest.raises(
        RowError, match="writes the answer in message 1 with thinking where it is the last"
    ):
        everything.render(read(untrained))


def test_arguments_reach_the_template_in_the_form_that_it_takes(tokenizer: Any) -> None:
    for arguments in ({"townkey": 'town "value"'}, json.dumps({"townkey": 'town "value"'})):
        row = read({"messages": [ASKED, answer(None, tool_calls=[call(arguments=arguments)])]})
        for name in ("qwen", "json", "arguments as text", "arguments as they are"):
            text, _ = template_of(tokenizer, TEMPLATES[name]).render(row)
            assert '{"townkey": "town \\"value\\""}' in text, name
        text, _ = template_of(tokenizer, TEMPLATES["parameters"]).render(row)
        assert '<parameter=townkey>\ntown "value"\n</parameter>' in text


def test_rows_with_tools_take_the_template_that_is_named_for_them(tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": TEMPLATES["chatml"], "tool_use": TEMPLATES["qwen"]}
    templates = ChatTemplates(tokenizer)
    for kind in ("call", "result", "tools"):
        text, _ = templates.render(read(ROWS[kind][0]))
        assert all(word in text for word in ROWS[kind][1])
        if "tools" in ROWS[kind][0]:
            assert text.strip() == tokenizer.apply_chat_template(
                ROWS[kind][0]["messages"], tools=ROWS[kind][0]["tools"], tokenize=False
            ).strip()  # fmt: skip
    plain, _ = templates.render(read(ROWS["words"][0]))
    assert plain == tokenizer.apply_chat_template(ROWS["words"][0]["messages"], tokenize=False)
    tokenizer.chat_template = {"default": TEMPLATES["chatml"], "rag": TEMPLATES["qwen"]}
    with pytest.raises(RowError, match="leaves out the call of 'clockname'"):
        ChatTemplates(tokenizer).render(read(ROWS["call"][0]))
    tokenizer.chat_template = {"rag": TEMPLATES["chatml"], "tool_use": TEMPLATES["qwen"]}
    with pytest.raises(
        ConfigError,
        match="has the chat templates rag, tool_use, and none named default: save the one",
    ):
        check_chat_template(tokenizer, "some/model")


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_a_template_without_tools_does_not_write_a_result_as_an_answer(
    name: str, tokenizer: Any
) -> None:
    row = {"messages": [ASKED, answer("one moment"), RESULT, answer()]}
    with pytest.raises(
        RowError,
        match=f"the template {name} knows system \\(first\\), user and assistant, not tool",
    ):
        template_of(tokenizer, TEMPLATES[name]).render(read(row))
    late = {"messages": [ASKED, answer(), {"role": "system", "content": "x"}, answer()]}
    with pytest.raises(RowError, match="not system"):
        template_of(tokenizer, TEMPLATES[name]).render(read(late))


def test_pieces_that_fill_a_long_text_are_told_apart_in_no_time(tokenizer: Any) -> None:
    turns = [
        {"role": "user", "content": "a" * 200_000},
        answer("a"),
        {"role": "user", "content": "ab" * 100_000},
        answer("b"),
    ]
    begun = time.perf_counter()
    for row in ({"messages": turns}, {"messages": turns[2:] + turns[:2]}):
        template_of(tokenizer, TEMPLATES["json"]).render(read(row))
    assert time.perf_counter() - begun < 10


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_a_system_message_that_no_question_follows_is_missed(name: str, tokenizer: Any) -> None:
    row = {"messages": [{"role": "system", "content": "be brief"}, answer(), ASKED, answer()]}
    with pytest.raises(
        RowError, match=r"leaves out the content of message 0 \(system\) \('be brief'\)"
    ):
        template_of(tokenizer, TEMPLATES[name]).render(read(row))


def test_a_name_is_looked_for_and_the_name_of_a_result_may_stand_with_its_call(
    tokenizer: Any,
) -> None:
    named = {"messages": [{**ASKED, "name": "Ada"}, answer()]}
    with pytest.raises(RowError, match=r"leaves out the name of message 0 \(user\) \('Ada'\)"):
        template_of(tokenizer, TEMPLATES["json"]).render(read(named))
    stranger = {"messages": [ASKED, {**RESULT, "name": "othername"}, answer()]}
    with pytest.raises(RowError, match="leaves out the name of a tool's result"):
        template_of(tokenizer, TEMPLATES["json"]).render(read(stranger))
    template_of(tokenizer, TEMPLATES["json"]).render(read(ROWS["result"][0]))


LETTERS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12
).filter(str.strip)
VALUES = st.recursive(
    LETTERS
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans()
    | st.none()
    | st.just(""),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LETTERS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    words=LETTERS,
    said=LETTERS | st.just(""),
    name=LETTERS,
    arguments=st.dictionaries(LETTERS, VALUES, max_size=4),
    result=LETTERS,
    name_of=st.sampled_from(
        [
            "json",
            "json and thoughts",
            "marked",
            "arguments as text",
            "quoted results",
            "parameters",
            "qwen",
        ]
    ),
)
def test_no_row_is_refused_for_its_words(
    words: str, said: str, name: str, arguments: dict[str, Any], result: str, name_of: str
) -> None:
    row = {
        "messages": [
            {"role": "user", "content": words},
            answer(said, tool_calls=[call(name, arguments)]),
            {**RESULT, "name": name, "content": result},
            answer(words),
        ]
    }
    template_of(TOKENIZER, TEMPLATES[name_of]).render(read(row))


TOKENIZER: Any = build_tokenizer(512)

#: What a template forgets -> what the row must say that it is missed.
FORGETS: list[tuple[str, Callable[[dict[str, Any]], bool]]] = [
    ("no results", lambda _: True),
    ("no names of calls", lambda _: True),
    ("no arguments", lambda arguments: bool(arguments)),
    ("no keys", lambda arguments: bool(arguments)),
]


@settings(max_examples=150, deadline=None)
@given(
    words=LETTERS,
    name=LETTERS,
    arguments=st.dictionaries(LETTERS, LETTERS | st.integers(), max_size=3),
    result=LETTERS,
    forgets=st.sampled_from(FORGETS),
)
def test_whatever_the_words_are_what_a_template_forgets_is_missed(
    words: str,
    name: str,
    arguments: dict[str, Any],
    result: str,
    forgets: tuple[str, Callable[[dict[str, Any]], bool]],
) -> None:
    template, missed = forgets
    turns = [{"role": "user", "content": words}, answer(words, tool_calls=[call(name, arguments)])]
    row = {"messages": [*turns, {**RESULT, "name": name, "content": result}, answer(words)]}
    if missed(arguments):
        with pytest.raises(RowError, match="leaves out"):
            template_of(TOKENIZER, TEMPLATES[template]).render(read(row))


def test_the_file_and_line_are_named(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from llmtune.config.groups.data import DataConfig
    from llmtune.data.prepare import prepare_data
    from llmtune.errors import DataError

    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(json.dumps(ROWS[kind][0]) for kind in ("words", "call", "call")))
    with pytest.raises(DataError) as caught:
        prepare_data(
            DataConfig(train=str(source), val_set_size=0),
            AutoTokenizer.from_pretrained(tiny_model),
            1,
            tmp_path,
        )
    assert str(caught.value).startswith(
        f"{source}:2: the chat template leaves out the call of 'clockname'"
    )
    assert "(2 like it)" in str(caught.value)

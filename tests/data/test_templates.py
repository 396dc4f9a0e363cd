"""Rows that are put together without rendering are those that the template would have rendered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import Environment

from llmtune.data.rows.conversation import Conversation, Message, Role
from llmtune.data.tokenize.chat_template import ChatTemplate
from llmtune.data.tokenize.static_template import Verbatim, find_verbatim
from tests.data.tokenizers import FAMILIES, load_smollm2, with_template


@pytest.fixture(scope="module")
def templates(cache: Path) -> dict[str, ChatTemplate]:
    own = {"own": ChatTemplate(load_smollm2(cache))}
    return own | {name: ChatTemplate(with_template(load_smollm2(cache), name)) for name in FAMILIES}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    words=st.lists(st.text(min_size=1, max_size=20), min_size=2, max_size=6),
    system=st.none() | st.text(min_size=1, max_size=20),
    untrained=st.integers(0, 5),
)
@pytest.mark.parametrize("name", ["own", *FAMILIES])
def test_text_and_spans_are_those_of_the_template(
    name: str,
    words: list[str],
    system: str | None,
    untrained: int,
    templates: dict[str, ChatTemplate],
) -> None:
    template = templates[name]
    roles = [Role.user, Role.assistant]
    messages = [
        Message(role=roles[n % 2], content=text, train=n != untrained)
        for n, text in enumerate(words[: len(words) // 2 * 2])
    ]
    conversation = Conversation(
        messages=(*([Message(role=Role.system, content=system)] if system else []), *messages)
    )
    built = template._layouts.render(conversation)
    if built is None:
        assert any(message.content != message.content.strip() for message in conversation.messages)
        return
    text, _ = template._apply(conversation.messages, conversation)
    assert built == (text, template._by_prefixes(conversation, text))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}", Verbatim.yes),
        (
            "{% for m in messages[1:] %}{{ m.content }}{% endfor %}{{ messages[0].content }}",
            Verbatim.yes,
        ),
        (
            "{% set rest = messages[1:] %}{% for m in rest %}{{ m.content | trim }}{% endfor %}",
            Verbatim.trimmed,
        ),
        (
            "{% for m in messages %}{% set text = 'x' + m.content %}{{ text }}{% endfor %}",
            Verbatim.yes,
        ),
        (
            "{% for m in messages %}{{ m.content if m.role == 'user' else 'x' }}{% endfor %}",
            Verbatim.yes,
        ),
        ("{{ messages | length }}", Verbatim.yes),
        (
            (
                "{% for m in messages %}{% set text = m.content %}{% if text %}{{ text }}{% endif"
                " %}{% endfor %}"
            ),
            Verbatim.no,
        ),
        (
            (
                "{% for m in messages %}{% if 'x' in m.content %}{{ m.content }}{% endif %}{%"
                " endfor %}"
            ),
            Verbatim.no,
        ),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", Verbatim.no),
        ("{% for m in messages %}{{ m.content.split('x')[0] }}{% endfor %}", Verbatim.no),
        ("{% for m in messages %}{{ m.content[:5] }}{% endfor %}", Verbatim.no),
        ("{% for m in messages %}{{ m['con' + 'tent'] | upper }}{% endfor %}", Verbatim.no),
        ("{% for m in messages %}{{ m }}{% endfor %}", Verbatim.no),
        ("{% for m in messages %}{{ m.get('content') }}{% endfor %}", Verbatim.no),
        ("{{ messages | tojson }}", Verbatim.no),
        ("{% for m in messages if m.content %}x{% endfor %}", Verbatim.no),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", Verbatim.no),
        (
            (
                "{% macro f(m) %}{{ m.content | upper }}{% endmacro %}{% for m in messages %}{{"
                " f(m) }}{% endfor %}"
            ),
            Verbatim.no,
        ),
        (
            (
                "{% set all = namespace(t='') %}{% for m in messages %}{% set all.t = all.t +"
                " m.content %}{% endfor %}"
            ),
            Verbatim.no,
        ),
        ("{% for m in messages %}{% set x = m %}{{ x.content | upper }}{% endfor %}", Verbatim.no),
        ("{% for a, b in messages | items %}{{ a.content }}{% endfor %}", Verbatim.no),
        ("{% for m in messages %}{{ loop.previtem.content | upper }}{% endfor %}", Verbatim.no),
        ("{% for m in messages %}{% for k in m %}{{ m[k] }}{% endfor %}{% endfor %}", Verbatim.no),
        ("{% for m in messages %}{{ ('%s' | format(m.content)) }}{% endfor %}", Verbatim.no),
        (
            "{% set a %}{{ messages[0].content }}{% endset %}{% if 'x' in a %}y{% endif %}",
            Verbatim.no,
        ),
        ("{% filter trim %}{{ messages[0].content }}{% endfilter %}", Verbatim.no),
        ("{% macro b() %}{{ messages[0].content }}{% endmacro %}{{ b() | upper }}", Verbatim.no),
    ],
)
def test_only_what_provably_writes_words_as_they_are_counts(
    template: str, expected: Verbatim
) -> None:
    assert find_verbatim(Environment().parse(template)) is expected


def test_words_that_are_written_twice_are_rendered(cache: Path) -> None:
    tokenizer: Any = load_smollm2(cache)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '/' + m.content + '<|im_end|>' }}{%"
        " endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    row = Conversation(
        messages=(Message(role=Role.user, content="a"), Message(role=Role.assistant, content="b"))
    )
    text, spans = ChatTemplate(tokenizer).render(row)
    assert text == "user: a/a<|im_end|>assistant: b/b<|im_end|>"
    assert [text[span.start : span.end] for span in spans] == ["b/b<|im_end|>"]


def test_a_template_that_looks_at_words_is_rendered(cache: Path) -> None:
    tokenizer: Any = load_smollm2(cache)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}{{ '!' if 'a' in"
        " m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:"
        " {% endif %}"
    )
    row = Conversation(
        messages=(
            Message(role=Role.user, content="aha"),
            Message(role=Role.assistant, content="ja"),
        )
    )
    text, spans = ChatTemplate(tokenizer).render(row)
    assert [text[span.start : span.end] for span in spans] == ["ja!<|im_end|>"]

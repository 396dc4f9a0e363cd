"""Rows that are put together without rendering are those that the template would have rendered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtune.data.rows.conversation import Conversation, Message, Role
from llmtune.data.tokenize.chat_template import ChatTemplate
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

"""A template tells who says what, which call a result answers, and what is the assistant's; or the
row is refused.
"""

from __future__ import annotations

from typing import Any

import pytest

from llmtune.data.formats.recipe import Recipe
from llmtune.data.rows.conversation import Conversation
from llmtune.data.rows.problems import RowError
from llmtune.data.tokenize.chat_template import ChatTemplate, load_chat_template
from llmtune.model.random_tokenizer import build_tokenizer
from tests.data.test_completeness import (
    ASKED,
    JSON_CALL,
    RESULT,
    SAID,
    TEMPLATES,
    TOOLS,
    answer,
    call,
    over_messages,
)

SYSTEM = {"role": "system", "content": "be brief"}
CALLED = answer(None, tool_calls=[call(), call("secondname", {"secondkey": "b"}, 1)])
SECOND = {
    **RESULT,
    "tool_call_id": "callcall1",
    "name": "secondname",
    "content": "result of the second",
}

#: Everybody but the user is written as the assistant.
EITHER = (
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"  # noqa: E501
    "{%- else -%}{{ '<|im_start|>assistant\n' + (m.content or '') }}"
    + JSON_CALL
    + "{{ '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
#: Knows a system message at the beginning only.
FIRST_SYSTEM = (
    "{%- if messages[0].role == 'system' -%}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"  # noqa: E501
    "{%- set messages = messages[1:] -%}{%- endif -%}" + EITHER
)
WITH_IDS = over_messages(
    SAID
    + "{%- for c in m.tool_calls or [] -%}{{ '\n' + c.id + ' ' + c.function | tojson }}{%- endfor -%}",  # noqa: E501
    "{{ '<|im_start|>tool\n' + m.tool_call_id + ' ' + m.content + '<|im_end|>\n' }}",
    TOOLS,
)
WITH_NAMES = over_messages(
    SAID + JSON_CALL,
    "{{ '<|im_start|>tool\n' + m.name + ': ' + m.content + '<|im_end|>\n' }}",
    TOOLS,
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|im_start|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(512)


def read(*messages: Any) -> Conversation:
    return Recipe("messages", {}).read({"messages": list(messages)})[0]


def template(tokenizer: Any, text: str) -> ChatTemplate:
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer)


@pytest.mark.parametrize(
    ("text", "messages", "who"),
    [
        (
            EITHER,
            (ASKED, answer("one moment"), {"role": "tool", "content": "5"}, answer()),
            r"message 2 \(tool\)",
        ),
        (EITHER, (ASKED, CALLED, RESULT, SECOND, answer()), r"message 2 \(tool\)"),
        (EITHER, (SYSTEM, ASKED, answer()), r"message 0 \(system\)"),
        (FIRST_SYSTEM, (SYSTEM, ASKED, answer(), SYSTEM, ASKED, answer()), r"message 3 \(system\)"),
        (
            FIRST_SYSTEM,
            (SYSTEM, ASKED, answer("moment"), {"role": "tool", "content": "5"}, answer()),
            r"message 3 \(tool\)",
        ),
    ],
)
def test_what_is_written_as_an_answer_and_is_none_is_refused(
    tokenizer: Any, text: str, messages: Any, who: str
) -> None:
    one = template(tokenizer, text)
    for _ in range(2):
        with pytest.raises(
            RowError,
            match=f"writes what {who} says as an answer of the assistant; take a data.chat_template",  # noqa: E501
        ):
            one.render(read(*messages))


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (EITHER, (ASKED, answer(), ASKED, answer())),
        (FIRST_SYSTEM, (SYSTEM, ASKED, answer())),
        (EITHER, ({**SYSTEM, "content": ""}, ASKED, answer())),
        (TEMPLATES["json"], (SYSTEM, ASKED, CALLED, RESULT, SECOND, answer())),
        (str(load_chat_template("qwen")), (SYSTEM, ASKED, CALLED, RESULT, SECOND, answer())),
        (str(load_chat_template("chatml")), (SYSTEM, ASKED, answer(), SYSTEM, ASKED, answer())),
        (str(load_chat_template("llama3")), (SYSTEM, ASKED, answer(), ASKED, answer())),
    ],
)
def test_templates_that_tell_who_speaks_are_taken(tokenizer: Any, text: str, messages: Any) -> None:
    _, spans = template(tokenizer, text).render(read(*messages))
    assert len(spans) == sum(message["role"] == "assistant" for message in messages)


def test_results_in_another_order_need_ids_or_names_in_the_text(tokenizer: Any) -> None:
    swapped = (ASKED, CALLED, SECOND, RESULT, answer())
    for text in (TEMPLATES["json"], TEMPLATES["marked"], str(load_chat_template("qwen"))):
        template(tokenizer, text).render(read(ASKED, CALLED, RESULT, SECOND, answer()))
        with pytest.raises(
            RowError, match=r"message 2 \(tool\) and those behind it answer calls in another order"
        ):
            template(tokenizer, text).render(read(*swapped))
    for text in (WITH_IDS, WITH_NAMES):
        assert "result of the second" in template(tokenizer, text).render(read(*swapped))[0]
    # The same function twice, which its name does not tell apart.
    again = answer(None, tool_calls=[call(), call(number=1)])
    same = (ASKED, again, {**SECOND, "name": "clockname"}, RESULT, answer())
    template(tokenizer, WITH_IDS).render(read(*same))
    with pytest.raises(RowError, match="in another order than they were made"):
        template(tokenizer, WITH_NAMES).render(read(*same))
    # Without ids their order is all there is.
    for rows in (
        (
            ASKED,
            CALLED,
            *({"role": "tool", "content": text} for text in ("one result", "another one")),
            answer(),
        ),
        (ASKED, CALLED, SECOND, answer()),
    ):
        template(tokenizer, TEMPLATES["json"]).render(read(*rows))


def mark(text: str) -> str:
    return "{% generation %}" + text + "{% endgeneration %}"


END = "{{ '<|im_end|>\n' }}"
HEAD = "{{ '<|im_start|>assistant\n' }}"


def writes(one_answer: str) -> str:
    """A template that writes answers so, without what begins them, and the rest as ChatML."""
    return (
        f"{TOOLS}{{%- for m in messages -%}}{{%- if m.role == 'assistant' -%}}{HEAD}{one_answer}{{%- else -%}}"  # noqa: E501
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"  # noqa: E501
        f"{{%- if add_generation_prompt -%}}{HEAD}{{%- endif -%}}"
    )


def if_else(test: str, then: str, otherwise: str) -> str:
    return f"{{%- if {test} -%}}{then}{{%- else -%}}{otherwise}{{%- endif -%}}"


@pytest.mark.parametrize(
    ("text", "messages", "message"),
    [
        # Calls outside of the marks, calls in answers without any, the last answer alone, all that
        # is said.
        (
            writes(mark(SAID) + JSON_CALL + END),
            (ASKED, answer("hm", tool_calls=[call()])),
            "does not mark the call of 'clock",
        ),
        (
            writes(if_else("m.tool_calls", SAID + JSON_CALL + END, mark(SAID + END))),
            (ASKED, answer(None, tool_calls=[call()]), RESULT, answer()),
            "does not mark the call of 'clockname' in message 1",
        ),
        (
            writes(if_else("loop.last", mark(SAID + END), SAID + END)),
            (ASKED, answer(), ASKED, answer()),
            r"does not mark the content of message 1 \(assistant\)",
        ),
        (
            "{%- for m in messages -%}"
            + mark("{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}")
            + "{%- endfor -%}",
            (ASKED, answer()),
            r"marks the content of message 0 \(user\) as the assistant's",
        ),
        (
            "{% generation %}{%- for m in messages -%}{{ m.content + '<|im_end|>\n' }}{%- endfor -%}{% endgeneration %}",  # noqa: E501
            (ASKED, answer(), ASKED, answer()),
            r"marks the content of message 0 \(user\)",
        ),
    ],
)
def test_marks_that_are_not_the_answers_are_refused(
    tokenizer: Any, text: str, messages: Any, message: str
) -> None:
    with pytest.raises(RowError, match=message):
        template(tokenizer, text).render(read(*messages))


def test_an_answer_without_a_mark_may_be_left_out_by_the_row(tokenizer: Any) -> None:
    text, spans = template(
        tokenizer, writes(if_else("loop.last", mark(SAID + END), SAID + END))
    ).render(read(ASKED, answer("first", train=False), ASKED, answer("second")))
    assert [text[span.start : span.end] for span in spans] == ["second<|im_end|>\n"]


def test_several_marks_of_an_answer_are_its_own(tokenizer: Any) -> None:
    twice = writes(if_else("m.tool_calls", mark(SAID) + mark(JSON_CALL + END), mark(SAID + END)))
    row = read(ASKED, answer("moment", tool_calls=[call()], train=False), RESULT, answer())
    text, spans = template(tokenizer, twice).render(row)
    assert [span.train for span in spans] == [False, False, True]
    assert text[spans[2].start : spans[2].end] == "the answer<|im_end|>\n"


def test_the_end_of_a_text_behind_the_last_word_is_no_difference(tokenizer: Any) -> None:
    """Phi-3's template ends every text with the end-of-text token, however many turns there are."""
    row = read(ASKED, answer("first"), ASKED, answer("second", train=False), ASKED, answer("third"))
    text, spans = template(tokenizer, PHI).render(row)
    trained = [(text[span.start : span.end], span.train) for span in spans]
    assert trained == [
        ("first<|im_start|>", True),
        ("second<|im_start|>", False),
        ("third<|im_start|>\n<|im_end|>", True),
    ]
    (only,) = template(tokenizer, PHI).render(read(ASKED, answer("first")))[1]
    assert only.train

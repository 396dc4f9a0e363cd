"""Templates of models that think: what cannot be trained yet is said to be about thinking, and what
can be is trained.
"""

from __future__ import annotations

from typing import Any

import pytest

from llmtune.config.groups.data import Overlong
from llmtune.data.rows.conversation import Conversation, Message, Role
from llmtune.data.rows.problems import RowError
from llmtune.data.tokenize.chat_template import load_chat_template
from llmtune.data.tokenize.settings import EncodeSettings
from llmtune.data.tokenize.token_row import TokenRow
from llmtune.data.tokenize.workers import make_encoder
from llmtune.model.random_tokenizer import build_tokenizer

#: Opens thinking in the prompt, and keeps none of it in the text: DeepSeek-R1.
OPENS = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>' }}"  # noqa: E501
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\nTAG\n' }}{%- endif -%}"  # noqa: E501
)

#: Puts empty thoughts before the last answer only: Qwen3.
FORGETS = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if loop.last and m.role == 'assistant' -%}{{ 'TAG\n\nEND\n\n' }}{%- endif -%}{{ m.content + '<|im_end|>\n' }}"  # noqa: E501
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

#: Ends the last answer in another way, which has nothing to do with thinking: gpt-oss.
ENDS = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\nOK ' + m.content }}"
    "{{ '<|im_end|>' if m.role == 'assistant' and loop.last else '<|im_start|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def encode(
    template: str, *turns: str, untrained: tuple[int, ...] = (), inputs: bool = False
) -> Any:
    tokenizer = build_tokenizer(512)
    tokenizer.chat_template = template
    roles = (Role.user, Role.assistant)
    messages = [
        Message(role=roles[n % 2], content=text, train=False if n in untrained else None)
        for n, text in enumerate(turns)
    ]
    settings = EncodeSettings(max_seq_length=512, overlong=Overlong.drop, train_on_inputs=inputs)
    (outcome,) = make_encoder(tokenizer, settings).encode([Conversation(messages=tuple(messages))])
    if isinstance(outcome, RowError):
        return str(outcome)
    assert isinstance(outcome, list)
    (row,) = outcome
    assert isinstance(row, TokenRow)
    return tokenizer.decode(row.ids[row.mask].tolist())


@pytest.mark.parametrize("tag", ["<think>", "<|channel|>analysis", "<thought>", "◁think▷"])
@pytest.mark.parametrize("answer", ["hello", "<tool", "<", "I was thinking", "x" * 300])
def test_thinking_that_the_prompt_opens_is_named(tag: str, answer: str) -> None:
    text = encode(OPENS.replace("TAG", tag), "hi", answer)
    assert text.startswith("the chat template opens the thinking of an answer in the prompt ('")
    assert "writes the answer in message 1 without thinking" in text
    assert "data.chat_template=qwen or chatml" in text


@pytest.mark.parametrize(
    ("tag", "end"), [("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|channel|>analysis", "x")]
)
@pytest.mark.parametrize("answer", ["hello", "<t", "x" * 300])
def test_thinking_that_is_forgotten_is_named(tag: str, end: str, answer: str) -> None:
    template = FORGETS.replace("TAG", tag).replace("END", end)
    text = encode(template, "hi", answer, "more", "yes")
    assert text.startswith(
        "the chat template writes the answer in message 1 with thinking where it is the last"
    )
    assert "'train': false" in text
    assert encode(template, "hi", answer) == f"{tag}\n\n{end}\n\n{answer}<|im_end|>", (
        "a single answer is trained"
    )


def test_what_the_message_says_can_be_trained_is_trained() -> None:
    template = FORGETS.replace("TAG", "<think>").replace("END", "</think>")
    assert (
        encode(template, "hi", "a", "more", "b", "and", "c", untrained=(1, 3))
        == "<think>\n\n</think>\n\nc<|im_end|>"
    )
    still = encode(template, "hi", "a", "more", "b", "and", "c", untrained=(1,))
    assert "the answer in message 3 with thinking" in still
    for name in ("qwen", "chatml"):
        assert (
            encode(load_chat_template(name) or "", "hi", "a", "more", "b")
            == "a<|im_end|>b<|im_end|>"
        )
    refused = encode(template, "hi", "a", "more", "b", untrained=(1,), inputs=True)
    assert "the answer in message 1 with thinking" in refused, (
        "all else is trained, so its place is needed"
    )


@pytest.mark.parametrize("answer", ["hello", "I was thinking <think>hard</think>"])
def test_other_differences_are_not_said_to_be_thinking(answer: str) -> None:
    between = encode(ENDS, "hi", answer, "more", "yes")
    assert "does not end a trained answer with a special token" in between
    before = encode(
        ENDS.replace("\nOK '", "\n' + ('Last: ' if loop.last else 'OK ')"),
        "hi",
        answer,
        "more",
        "yes",
    )
    assert "differently with and without what surrounds it" in before
    for text in (between, before):
        assert "thinking" not in text.replace(answer, "")

"""Which tokens are trained: exactly the assistant's words and the end of the turn."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llmtune.config.groups.data import Overlong
from llmtune.data.rows.conversation import Conversation, Message, Role
from llmtune.data.rows.problems import RowError
from llmtune.data.tokenize.chat_template import check_chat_template, load_chat_template
from llmtune.data.tokenize.settings import EncodeSettings
from llmtune.data.tokenize.token_row import Overflow, TokenRow
from llmtune.data.tokenize.workers import make_encoder
from llmtune.errors import ConfigError
from llmtune.model.random_tokenizer import build_tokenizer
from tests.data.tokenizers import FAMILIES, load_smollm2, with_template

#: ChatML with the marks of the field around what the assistant says and its end of turn.
MARKED = (
    "{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}{{ '<|im_start|>assistant\n' }}"  # noqa: E501
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{%- else -%}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{%- endif -%}"  # noqa: E501
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


@pytest.fixture(scope="module")
def chatml(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def families(cache: Path) -> dict[str, Any]:
    return {name: with_template(load_smollm2(cache), name) for name in FAMILIES}


def talk(*turns: str, system: str | None = None, **more: Any) -> Conversation:
    roles = [Role.user, Role.assistant]
    messages = [Message(role=roles[index % 2], content=text) for index, text in enumerate(turns)]
    if system:
        messages.insert(0, Message(role=Role.system, content=system))
    return Conversation(messages=tuple(messages), **more)


def encode(
    tokenizer: Any,
    conversation: Conversation,
    length: int = 512,
    overlong: Overlong = Overlong.drop,
    inputs: bool = False,
) -> Any:
    (outcome,) = make_encoder(
        tokenizer, EncodeSettings(max_seq_length=length, overlong=overlong, train_on_inputs=inputs)
    ).encode([conversation])
    return outcome


def only(outcome: Any) -> TokenRow:
    assert isinstance(outcome, list), outcome
    (row,) = outcome
    assert isinstance(row, TokenRow)
    assert len(row.ids) == len(row.mask)
    return row


def trained_text(row: TokenRow, tokenizer: Any) -> str:
    return str(tokenizer.decode(row.ids[row.mask].tolist()))


def test_only_the_answers_and_their_end_of_turn_are_trained(chatml: Any) -> None:
    row = only(encode(chatml, talk("Hi", "Hello!", "And?", "Bye.")))
    assert trained_text(row, chatml) == "Hello!<|im_end|>Bye.<|im_end|>"
    assert row.ids[-1] == chatml.eos_token_id
    assert row.mask[-1]


def test_train_on_inputs_trains_everything(chatml: Any) -> None:
    assert only(encode(chatml, talk("Hi", "Hello!", system="Be kind."), inputs=True)).mask.all()


WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=40
).filter(
    lambda text: (
        bool(text.strip()) and not any(mark in text for mark in ("<", "|", ">", "[INST", "[/INST"))
    )
)


@pytest.mark.parametrize("name", FAMILIES)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(
    turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3),
    system=st.none() | WORDS,
)
def test_supervised_tokens_are_the_assistants_words_and_the_end_of_turn(
    name: str, turns: list[tuple[str, str]], system: str | None, families: dict[str, Any]
) -> None:
    tokenizer = families[name]
    _, bos, end = FAMILIES[name]
    # SmolLM2's vocabulary has not every byte, and drops rare letters.
    words = [text for turn in turns for text in turn]
    assume(
        all(
            tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
            for text in words
        )
    )
    row = only(encode(tokenizer, talk(*words, system=system), length=4096))
    kept = tokenizer.convert_ids_to_tokens(row.ids[row.mask].tolist())
    assert kept.count(end) == len(turns), "every end of turn is trained"
    answers = [part.strip() for part in trained_text(row, tokenizer).split(end)[:-1]]
    # Where a template trims, so may the answers be compared; elsewhere white space stands as it
    # was.
    assert answers == [answer.strip() for _, answer in turns]
    bos_id = tokenizer.convert_tokens_to_ids(bos)
    assert not (row.ids[0] == row.ids[1] == bos_id), "never a double BOS"
    if name in ("llama2", "llama3", "mistral"):
        assert row.ids[0] == bos_id
    masked = tokenizer.decode(row.ids[~row.mask].tolist())
    for question, _ in turns:
        assert question.strip() in masked


def test_masks_equal_those_of_transformers_where_a_template_marks_generation(cache: Path) -> None:
    """TRL's ``assistant_only_loss`` takes its masks from this call."""
    tokenizer = load_smollm2(cache)
    tokenizer.chat_template = MARKED
    encoder = make_encoder(
        tokenizer,
        EncodeSettings(max_seq_length=8192, overlong=Overlong.drop, train_on_inputs=False),
    )
    draw = random.Random(7)
    letters = [
        "word",
        "Zürich",
        "日本語",
        "🙂",
        "x = [1, 2]",
        "\n",
        "  two",
        "tail ",
        "1.5e-3",
        "don't",
    ]
    several = 0
    for _ in range(1000):
        turns = [
            " ".join(draw.choices(letters, k=draw.randint(1, 12))).strip() or "a"
            for _ in range(2 * draw.randint(1, 4))
        ]
        conversation = talk(*turns, system=draw.choice([None, "Be brief."]))
        reference = tokenizer.apply_chat_template(
            [message.to_dict() for message in conversation.messages],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        (outcome,) = encoder.encode([conversation])
        row = only(outcome)
        end = len(row.ids)
        assert row.ids.tolist() == reference["input_ids"][:end]
        assert row.mask.astype(int).tolist() == reference["assistant_masks"][:end]
        assert not any(reference["assistant_masks"][end:])
        several += len(turns) > 2
    assert several > 500


def test_marked_and_derived_masks_agree(chatml: Any, tiny_model: Path) -> None:
    marked = AutoTokenizer.from_pretrained(tiny_model)
    marked.chat_template = MARKED
    plain = AutoTokenizer.from_pretrained(tiny_model)
    plain.chat_template = load_chat_template("chatml")
    conversation = talk("Hi", "Hello!", "And?", "Bye.", system="Be kind.")
    first, second = only(encode(marked, conversation)), only(encode(plain, conversation))
    assert np.array_equal(first.ids, second.ids)
    assert np.array_equal(first.mask, second.mask)


@pytest.mark.parametrize("template", [MARKED, None])
def test_a_message_can_be_left_untrained(template: str | None, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template or tokenizer.chat_template
    messages = (
        Message(role=Role.user, content="a"),
        Message(role=Role.assistant, content="wrong", train=False),
        Message(role=Role.user, content="b"),
        Message(role=Role.assistant, content="right"),
    )
    assert (
        trained_text(only(encode(tokenizer, Conversation(messages=messages))), tokenizer)
        == "right<|im_end|>"
    )


def test_tool_calls_are_trained_and_their_results_are_not(families: dict[str, Any]) -> None:
    tokenizer = families["qwen"]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = (
        Message(role=Role.user, content="1+1?"),
        Message(role=Role.assistant, content="", extra={"tool_calls": [call]}),
        Message(role=Role.tool, content="2"),
        Message(role=Role.assistant, content="Two."),
    )
    tools = ({"type": "function", "function": {"name": "add", "parameters": {}}},)
    row = only(encode(tokenizer, Conversation(messages=messages, tools=tools)))
    text = trained_text(row, tokenizer)
    assert '"name": "add"' in text
    assert text.endswith("<|im_end|>Two.<|im_end|>")
    assert "tool_response" not in text
    assert "Their signatures" in tokenizer.decode(row.ids.tolist())


def test_prompt_and_completion_have_no_template(families: dict[str, Any]) -> None:
    tokenizer = families["llama2"]
    row = only(encode(tokenizer, talk("2+2=", "4", plain=True)))
    assert tokenizer.decode(row.ids.tolist()) == "<s>2+2=4</s>"
    assert trained_text(row, tokenizer) == "4</s>"


def test_plain_text_is_trained_whole_and_ends(families: dict[str, Any]) -> None:
    tokenizer = families["llama3"]
    row = only(
        encode(
            tokenizer,
            Conversation(
                messages=(Message(role=Role.assistant, content="Once upon a time 🙂"),), plain=True
            ),
        )
    )
    assert trained_text(row, tokenizer) == "Once upon a time 🙂<|eot_id|>"
    assert row.ids[0] == tokenizer.bos_token_id


def test_long_texts_are_split_without_losing_a_token(chatml: Any) -> None:
    text = Conversation(messages=(Message(role=Role.assistant, content="word " * 100),), plain=True)
    whole = only(encode(chatml, text, length=4096))
    pieces = encode(chatml, text, length=64, overlong=Overlong.split)
    assert [len(piece.ids) for piece in pieces[:-1]] == [64] * (len(pieces) - 1)
    assert np.array_equal(np.concatenate([piece.ids for piece in pieces]), whole.ids)
    assert isinstance(
        encode(chatml, talk("a", "word " * 100), length=64, overlong=Overlong.split), RowError
    )


def test_over_long_rows_are_dropped_truncated_or_refused(chatml: Any) -> None:
    long = talk("Hi", "word " * 200)
    dropped = encode(chatml, long, length=64)
    assert isinstance(dropped, Overflow)
    assert dropped.tokens > 200
    cut = only(encode(chatml, long, length=64, overlong=Overlong.truncate))
    assert len(cut.ids) == 64
    assert cut.truncated
    assert cut.ids[-1] == chatml.eos_token_id
    assert cut.mask[-1]
    refused = encode(chatml, long, length=64, overlong=Overlong.error)
    assert isinstance(refused, RowError)
    assert "tokens, more than data.max_seq_length=64" in str(refused)


def test_a_cut_inside_the_users_turn_trains_nothing_of_it(chatml: Any) -> None:
    conversation = talk("Hi", "Hello!", "word " * 200, "Bye.")
    cut = only(encode(chatml, conversation, length=64, overlong=Overlong.truncate))
    assert len(cut.ids) < 64
    assert trained_text(cut, chatml) == "Hello!<|im_end|>"
    assert cut.mask[-1]
    whole = only(encode(chatml, conversation, length=64, overlong=Overlong.truncate, inputs=True))
    assert np.array_equal(whole.ids, cut.ids)
    assert whole.mask.all()


def test_a_cut_row_ends_its_turn_once_whatever_follows_in_the_template(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = MARKED.replace(
        "'<|im_end|>' }}{% endgeneration %}{{ '\n' }}", "'<|im_end|>\n' }}{% endgeneration %}"
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    cut = only(encode(tokenizer, talk("Hi", "word " * 200), length=64, overlong=Overlong.truncate))
    assert cut.ids[-1] == end
    # A cut right behind an answer adds no second end of turn.
    conversation = talk("Hi", "Hello!", "word " * 200, "Bye.")
    whole = only(encode(tokenizer, conversation, length=4096))
    first_end = int(np.flatnonzero(whole.mask & (whole.ids == end))[0])
    for length in (first_end + 1, first_end + 2, first_end + 3):
        cut = only(encode(tokenizer, conversation, length=length, overlong=Overlong.truncate))
        assert np.count_nonzero(cut.mask & (cut.ids == end)) == 1, length
        assert len(cut.ids) <= length


def test_a_text_of_one_token_more_than_the_limit_keeps_its_end(chatml: Any) -> None:
    text = Conversation(messages=(Message(role=Role.assistant, content="word " * 100),), plain=True)
    whole = only(encode(chatml, text, length=4096))
    pieces = encode(chatml, text, length=len(whole.ids) - 1, overlong=Overlong.split)
    assert np.array_equal(np.concatenate([piece.ids for piece in pieces]), whole.ids)
    assert len(pieces[-1].ids) == 2


def test_training_on_inputs_leaves_out_what_a_message_forbids(chatml: Any) -> None:
    messages = (
        Message(role=Role.user, content="a"),
        Message(role=Role.assistant, content="wrong", train=False),
    )
    more = (Message(role=Role.user, content="b"), Message(role=Role.assistant, content="right"))
    row = only(encode(chatml, Conversation(messages=messages + more), inputs=True))
    text = trained_text(row, chatml)
    assert "wrong" not in text
    assert "<|im_start|>user\na<|im_end|>" in text
    assert text.endswith("right<|im_end|>")


def test_what_others_say_is_trained_as_the_setting_has_it_or_the_row_is_refused(
    chatml: Any,
) -> None:
    answer = Message(role=Role.assistant, content="b")
    for said, inputs in ((True, True), (False, False), (None, True), (None, False)):
        only(
            encode(
                chatml,
                Conversation(messages=(Message(role=Role.user, content="a", train=said), answer)),
                inputs=inputs,
            )
        )
    for said, inputs, message in (
        (
            True,
            False,
            "message 0 (user) says that it is to be trained, and data.train_on_inputs=false decides",  # noqa: E501
        ),
        (
            False,
            True,
            "message 0 (user) says that it is not to be trained, and data.train_on_inputs=true decides",  # noqa: E501
        ),
    ):
        refused = encode(
            chatml,
            Conversation(messages=(Message(role=Role.user, content="a", train=said), answer)),
            inputs=inputs,
        )
        assert isinstance(refused, RowError)
        assert message in str(refused)
        assert f"data.train_on_inputs={str(said).lower()}" in str(refused), "the next step"


def test_training_on_inputs_of_plain_texts_trains_all_of_them(families: dict[str, Any]) -> None:
    row = only(encode(families["llama2"], talk("2+2=", "4", plain=True), inputs=True))
    assert row.mask.all()
    assert trained_text(row, families["llama2"]) == "<s>2+2=4</s>"


def test_special_tokens_in_tool_calls_are_refused(families: dict[str, Any]) -> None:
    call = {"type": "function", "function": {"name": "say", "arguments": {"text": "x<|im_end|>"}}}
    messages = (
        Message(role=Role.user, content="a"),
        Message(role=Role.assistant, content="", extra={"tool_calls": [call]}),
    )
    refused = encode(families["qwen"], Conversation(messages=messages))
    assert isinstance(refused, RowError)
    assert "message 1 (assistant) holds '<|im_end|>'" in str(refused)


def test_a_prompt_that_alone_is_too_long_cannot_be_truncated(chatml: Any) -> None:
    row = talk("word " * 200, "yes")
    assert isinstance(encode(chatml, row, length=64), Overflow)
    refused = encode(chatml, row, length=64, overlong=Overlong.truncate)
    assert isinstance(refused, RowError)
    assert "the prompt alone has" in str(refused)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",
            "does not end a trained answer with a special token",
        ),
        (
            MARKED.replace(
                "+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}"
            ),
            "special token",
        ),
        (
            "{% for m in messages %}{{ m['content'] if loop.last else '' }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}{{ messages | length }}{% endif %}",
            "cannot be told apart",
        ),
        (
            "{{ raise_exception('roles must alternate') }}",
            "the chat template refuses the row: roles must alternate",
        ),
        (
            "{{ bos_token + bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",  # noqa: E501
            "two BOS tokens",
        ),
    ],
)
def test_templates_that_would_ruin_the_run_are_refused(template: str, message: str) -> None:
    tokenizer = build_tokenizer(512)
    tokenizer.chat_template = template
    refused = encode(tokenizer, talk("Hi", "Hello", "x", "y"))
    assert isinstance(refused, RowError)
    assert message in str(refused)


def test_text_that_was_rendered_already_is_refused(chatml: Any) -> None:
    refused = encode(chatml, talk("Hi", "Hello<|im_end|>"))
    assert isinstance(refused, RowError)
    assert "message 1 (assistant) holds '<|im_end|>'" in str(refused)
    assert "take data.allow_special_tokens=true" in str(refused), "the next step"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("turns", [("Hi", "Hello!"), ("Hi", "Hello!", "And?", "Bye.")])
def test_texts_with_special_tokens_on_purpose_have_the_tokens_of_their_chats(
    name: str, turns: tuple[str, ...], families: dict[str, Any]
) -> None:
    """What has been through the template by hand is trained as what goes through it here."""
    tokenizer = families[name]
    chat = only(encode(tokenizer, talk(*turns)))
    text = tokenizer.decode(chat.ids.tolist())
    encoder = make_encoder(
        tokenizer,
        EncodeSettings(
            max_seq_length=512,
            overlong=Overlong.drop,
            train_on_inputs=False,
            allow_special_tokens=True,
        ),
    )
    row = only(
        encoder.encode(
            [Conversation(messages=(Message(role=Role.assistant, content=text),), plain=True)]
        )[0]
    )
    start = 0 if chat.ids[0] == tokenizer.bos_token_id else 1
    assert row.ids[start:].tolist() == chat.ids.tolist(), "one BOS, one end"
    assert row.ids[0] == tokenizer.bos_token_id
    assert row.mask[1:].all()


def test_special_tokens_on_purpose_may_stand_in_chats_and_tools(families: dict[str, Any]) -> None:
    encoder = make_encoder(
        families["qwen"],
        EncodeSettings(
            max_seq_length=512,
            overlong=Overlong.drop,
            train_on_inputs=False,
            allow_special_tokens=True,
        ),
    )
    tools = ({"type": "function", "function": {"name": "f<|im_end|>", "parameters": {}}},)
    row = only(
        encoder.encode([talk("What is <|im_start|>?", "A token, as is <|im_end|>.", tools=tools)])[
            0
        ]
    )
    assert trained_text(row, families["qwen"]) == "A token, as is <|im_end|>.<|im_end|>"


def test_a_template_that_is_no_jinja_is_named_by_its_line(chatml: Any) -> None:
    tokenizer = build_tokenizer(512)
    tokenizer.chat_template = "{{ messages }}\n{% for m in messages %}"
    with pytest.raises(
        ConfigError, match=r"the chat template of org/model, .* is no Jinja: line 2: .*name another"
    ):
        check_chat_template(tokenizer, "org/model")
    text = Conversation(
        messages=(Message(role=Role.assistant, content="a text needs no template"),), plain=True
    )
    assert trained_text(only(encode(tokenizer, text)), tokenizer).startswith(
        "a text needs no template"
    )


def test_templates_are_found_by_name_or_file(tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages }}")
    assert load_chat_template(str(own)) == "{{ messages }}"
    assert load_chat_template(None) is None
    own.write_text(" \n")
    with pytest.raises(ConfigError, match=r"data\.chat_template=.*: the file is empty"):
        load_chat_template(str(own))
    with pytest.raises(ConfigError, match="there are chatml, llama2, llama3, mistral, qwen"):
        load_chat_template("lama3")
    tokenizer = build_tokenizer(512)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"has no chat template .* data.chat_template=llama3"):
        check_chat_template(tokenizer, "meta-llama/Meta-Llama-3-70B")

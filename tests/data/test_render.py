"""Which tokens are trained: exactly the assistant's words and the end of the turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmtune.config.schema import Overlong
from llmtune.data.conversation import Conversation, Message, Role
from llmtune.data.render import check_chat_template, load_chat_template, render
from llmtune.errors import ConfigError, DataError
from llmtune.model.random_model import build_tokenizer


@pytest.fixture(scope="module")
def chatml(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def with_template(name: str, *special: str, **tokens: str) -> Any:
    tokenizer = build_tokenizer(512)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    for key, token in tokens.items():
        setattr(tokenizer, key, token)
    tokenizer.chat_template = load_chat_template(name)
    return tokenizer


def talk(*turns: str, system: str | None = None) -> Conversation:
    roles = [Role.user, Role.assistant]
    messages = [Message(roles[index % 2], text) for index, text in enumerate(turns)]
    if system:
        messages.insert(0, Message(Role.system, system))
    return Conversation(tuple(messages), "rows.jsonl:7")


def trained_text(row: Any, tokenizer: Any) -> str:
    kept = [token for token, trained in zip(row.input_ids, row.mask, strict=True) if trained]
    return str(tokenizer.decode(kept))


def test_only_the_answers_and_their_end_of_turn_are_trained(chatml: Any) -> None:
    row = render(talk("Hi", "Hello!", "And?", "Bye."), chatml, 512, Overlong.drop)
    assert row is not None
    assert trained_text(row, chatml) == "Hello!<|im_end|>Bye.<|im_end|>"
    assert row.input_ids[-1] == chatml.eos_token_id
    assert row.mask[-1]


def test_train_on_inputs_trains_everything(chatml: Any) -> None:
    row = render(talk("Hi", "Hello!", system="Be kind."), chatml, 512, Overlong.drop, train_on_inputs=True)
    assert row is not None
    assert all(row.mask)


@pytest.mark.parametrize(
    ("name", "special", "tokens", "expected"),
    [
        (
            "llama3",
            ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
            "one two<|eot_id|>three<|eot_id|>",
        ),
        ("llama2", ("<s>", "</s>"), {"bos_token": "<s>", "eos_token": "</s>"}, " one two </s> three </s>"),
        ("chatml", (), {}, "one two<|im_end|>three<|im_end|>"),
    ],
)
def test_the_shipped_templates_mask_right(name: str, special: Any, tokens: Any, expected: str) -> None:
    tokenizer = with_template(name, *special, **tokens)
    row = render(talk("a", "one two", "b", "three", system="sys"), tokenizer, 512, Overlong.drop)
    assert row is not None
    assert trained_text(row, tokenizer) == expected
    bos = tokenizer.convert_tokens_to_ids(tokens.get("bos_token", "<|im_start|>"))
    assert row.input_ids[0] == bos
    assert row.input_ids[1] != bos, "never a double BOS"


def test_over_long_rows_are_dropped_truncated_or_refused(chatml: Any) -> None:
    long = talk("Hi", "word " * 200)
    assert render(long, chatml, 64, Overlong.drop) is None
    cut = render(long, chatml, 64, Overlong.truncate)
    assert cut is not None
    assert len(cut.input_ids) == len(cut.mask) == 64
    assert cut.truncated
    assert cut.input_ids[-1] == chatml.eos_token_id
    assert cut.mask[-1]
    with pytest.raises(DataError, match=r"rows.jsonl:7: the row has \d+ tokens, more than data.max_seq_length=64"):
        render(long, chatml, 64, Overlong.error)


def test_a_cut_inside_the_users_turn_trains_nothing_of_it(chatml: Any) -> None:
    row = talk("Hi", "Hello!", "word " * 200, "Bye.")
    cut = render(row, chatml, 64, Overlong.truncate)
    assert cut is not None
    assert len(cut.input_ids) < 64
    assert trained_text(cut, chatml) == "Hello!<|im_end|>"
    assert cut.mask[-1]
    whole = render(row, chatml, 64, Overlong.truncate, train_on_inputs=True)
    assert whole is not None
    assert (whole.input_ids, all(whole.mask)) == (cut.input_ids, True)


@pytest.mark.parametrize("overlong", list(Overlong))
def test_a_prompt_that_alone_is_too_long_is_always_an_error(chatml: Any, overlong: Overlong) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:7: the prompt alone has \d+ tokens") as caught:
        render(talk("word " * 200, "yes"), chatml, 64, overlong)
    assert caught.value.exit_code == 4


def test_a_template_that_ends_no_turn_is_refused(chatml: Any) -> None:
    tokenizer = build_tokenizer(512)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(DataError, match="does not end an answer with a special token"):
        render(talk("Hi", "Hello"), tokenizer, 64, Overlong.drop)


def test_a_template_that_rewrites_history_is_refused() -> None:
    tokenizer = build_tokenizer(512)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] if loop.last else '' }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}{{ messages | length }}{% endif %}"
    )
    with pytest.raises(DataError, match="cannot be told apart"):
        render(talk("Hi", "Hello", "x", "y"), tokenizer, 64, Overlong.drop)


def test_templates_are_found_by_name_or_file(tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages }}")
    assert load_chat_template(str(own)) == "{{ messages }}"
    assert load_chat_template(None) is None
    with pytest.raises(ConfigError, match="there are chatml, llama2, llama3"):
        load_chat_template("lama3")
    tokenizer = build_tokenizer(512)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"has no chat template .* data.chat_template=llama3"):
        check_chat_template(tokenizer, "meta-llama/Meta-Llama-3-70B")

"""``chat`` with templates that refuse the conversation, and with tokens that the model does not
know.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llmtune.cli.main import main
from llmtune.errors import ConfigError, DataError
from llmtune.model.chat_turns import end_of_turn_ids

WRITES = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"  # noqa: E501
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

#: Template, overrides, what stands on standard input; what is said.
REFUSED: dict[str, tuple[str, list[str], str, str]] = {
    "no system prompt": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"  # noqa: E501
        + WRITES,
        ["chat.system=be brief", "chat.prompt=hi"],
        "",
        "refuses the conversation (system, user): System role not supported; leave chat.system out, or take another",  # noqa: E501
    ),
    "one question only": (
        "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + WRITES,
        ["chat.max_new_tokens=1"],
        "hi\nagain\n",
        "refuses the conversation (user, assistant, user): one turn; take another data.chat_template",  # noqa: E501
    ),
    "a name that is not there": (
        "{{ knowledge.base }}" + WRITES,
        ["chat.prompt=hi"],
        "",
        "'knowledge' is undefined",
    ),
    "a sum of text and number": (
        "{{ 'a' + 1 }}" + WRITES,
        ["chat.prompt=hi"],
        "",
        "refuses the conversation (user): ",
    ),
    "a division": ("{{ 1 / 0 }}" + WRITES, ["chat.prompt=hi"], "", "division by zero"),
    "no Jinja": ("{% for %}" + WRITES, ["chat.prompt=hi"], "", "is no Jinja: line 1: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_raises_is_an_error_of_one_line(
    name: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template, overrides, typed, message = REFUSED[name]
    file = tmp_path / "a.jinja"
    file.write_text(template)
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    code = main(["chat", f"base={tiny_model}", f"data.chat_template={file}", *overrides])
    error = capsys.readouterr().err
    assert code == ConfigError.exit_code, error
    assert message in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1


def test_a_template_that_wants_a_system_prompt_still_says_how_turns_end(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = WRITES
    ends = end_of_turn_ids(tokenizer)
    refuses = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    )
    tokenizer.chat_template = refuses + WRITES
    assert end_of_turn_ids(tokenizer) == ends
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert end_of_turn_ids(tokenizer) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("extra", [1, 3])
def test_a_prompt_with_a_token_beyond_the_embedding_is_refused(
    extra: int, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<new {number}>" for number in range(rows - len(tokenizer) + extra)])
    last = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    tokenizer.save_pretrained(model)
    assert main(["chat", f"base={model}", f"chat.prompt=what is {last} ?"]) == DataError.exit_code
    assert (
        f"token {len(tokenizer) - 1} ('{last}'), and the model has embeddings for {rows}"
        in capsys.readouterr().err
    )

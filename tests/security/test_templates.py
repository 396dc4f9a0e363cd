"""A stranger's chat template may loop: it is ended, wherever it is rendered, and nothing else
is.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtune import template_bounds
from llmtune.config.groups.model import ModelConfig
from llmtune.data.rows.conversation import Conversation, Message, Role
from llmtune.data.rows.problems import RowError
from llmtune.data.tokenize.chat_template import ChatTemplates, check_chat_template
from llmtune.errors import ConfigError
from llmtune.export.verify.export_checks import _find_template_problems
from llmtune.model.chat_turns import end_of_turn_ids, render_prompt
from llmtune.model.tokenizer import load_tokenizer
from llmtune.template_bounds import bounded_template

#: More than a machine does in a lifetime, by means that Jinja's sandbox allows.
ENDLESS = {
    "loops in loops": (
        "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3
    ),
    "a macro": (
        "{% macro f(n) %}{% for a in range(9) %}{{ f(n - 1) if n else '' }}{% endfor %}{% endmacro"
        " %}{{ f(90) }}"
    ),
    "lipsum": "{{ lipsum(n=10**12) }}",
    "filters": (
        "{% for a in range(99999) %}{{ range(99999)|map('string')|join|length }}{% endfor %}"
    ),
}
POWERS = [
    "{{ 9 ** (9 ** 9) }}",
    "{{ 2 ** 1000000000 }}",
    "{{ 2 ** n }}",
    "{% if 3 ** 2 ** 99 %}{% endif %}",
    "{{ (2 ** 64) ** 64 }}",
]
ROW = Conversation(
    messages=(Message(role=Role.user, content="a"), Message(role=Role.assistant, content="b"))
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_bounds, "SECONDS", 0.1)
    monkeypatch.setattr(template_bounds, "_POLL_SECONDS", 0.02)


def tokenizer_with(template: str, folder: Path) -> Any:
    tokenizer = load_tokenizer(folder, ModelConfig(name_or_path="random"), None)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_does_not_end_is_ended(template: str, tiny_model: Path) -> None:
    tokenizer = tokenizer_with(template, tiny_model)
    check_chat_template(tokenizer, "m")
    ways: list[Callable[[], object]] = [
        lambda: ChatTemplates(tokenizer).render(ROW),
        lambda: ChatTemplates(tokenizer).render_prompt(ROW),
        lambda: render_prompt(tokenizer, [{"role": "user", "content": "a"}]),
        lambda: end_of_turn_ids(tokenizer),
    ]
    for way in ways:
        began = time.monotonic()
        with pytest.raises(ConfigError, match=r"the chat template has not ended after 0.1 s"):
            way()
        assert time.monotonic() - began < 10
    (problem,) = _find_template_problems(tokenizer)
    assert "has not ended" in problem


@pytest.mark.parametrize(
    "template",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ g() }}",
        "{% for m in messages recursive %}{{ m.content }}{{ loop(messages) }}{% endfor %}",
    ],
    ids=["a macro", "two macros", "a loop"],
)
def test_a_template_that_calls_itself_is_refused_as_one_that_raises(
    template: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's limit of calls comes before the limit of time; it is an error of the template, not
    of the program.
    """
    # Thousands of calls take a tenth of a second on a slow machine.
    monkeypatch.setattr(template_bounds, "SECONDS", 10.0)
    tokenizer = tokenizer_with(template, tiny_model)
    for way in (ChatTemplates(tokenizer).render, ChatTemplates(tokenizer).render_prompt):
        with pytest.raises(RowError, match="the chat template refuses the row: .*recursion"):
            way(ROW)
    with pytest.raises(
        ConfigError, match=r"the chat template refuses the conversation \(user\): .*recursion"
    ):
        render_prompt(tokenizer, [{"role": "user", "content": "a"}])
    assert end_of_turn_ids(tokenizer) == [tokenizer.eos_token_id]
    (problem,) = _find_template_problems(tokenizer)
    assert "recursion" in problem


@pytest.mark.parametrize("template", POWERS)
def test_a_power_that_nobody_can_compute_is_refused_before_it_is_compiled(
    template: str, tiny_model: Path
) -> None:
    tokenizer = tokenizer_with(template, tiny_model)
    refused = "the chat template raises to a power without a small exponent, in line 1"
    with pytest.raises(ConfigError, match=refused):
        check_chat_template(tokenizer, "m")
    with pytest.raises(ConfigError, match=refused):
        load_tokenizer(tiny_model, ModelConfig(name_or_path="random"), template)
    assert refused in _find_template_problems(tokenizer)[0]


def test_a_small_power_is_a_number_like_any(tiny_model: Path) -> None:
    check_chat_template(
        tokenizer_with(
            "{{ 2 ** 10 }}{% for m in messages %}{{ m.content }}{% endfor %}", tiny_model
        ),
        "m",
    )


def test_other_threads_are_ended_too_and_what_follows_is_not(tiny_model: Path) -> None:
    tokenizer = tokenizer_with(ENDLESS["loops in loops"], tiny_model)
    found: list[BaseException | None] = []

    def render() -> None:
        try:
            ChatTemplates(tokenizer).render(ROW)
        except BaseException as error:
            found.append(error)
        # Nothing is left that would end this.
        sum(number % 7 for number in range(3_000_000))
        found.append(None)

    threads = [threading.Thread(target=render) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(type(error).__name__ for error in found) == ["ConfigError"] * 3 + ["NoneType"] * 3


def test_waiting_is_not_computing() -> None:
    with bounded_template():
        time.sleep(0.4)


def test_time_is_counted_for_each_template_anew() -> None:
    for _ in range(6):
        with bounded_template():
            began = time.thread_time()
            while time.thread_time() - began < 0.05:
                pass


def test_what_a_template_raises_is_not_lost() -> None:
    with pytest.raises(ValueError, match="of the template"), bounded_template():
        raise ValueError("of the template")


def test_the_moment_of_the_end_is_safe() -> None:
    """Blocks that end about when their time does: each raises the one error or none, and nothing
    comes later.
    """
    raised = 0
    for number in range(12):
        try:
            with bounded_template():
                began = time.thread_time()
                while time.thread_time() - began < (0.09 + 0.004 * number if number < 11 else 1.0):
                    pass
        except ConfigError:
            raised += 1
        time.sleep(0.01)
        sum(range(1000))
    assert 0 < raised < 12


@pytest.mark.process
def test_a_child_of_a_fork_is_watched_too() -> None:
    with bounded_template():
        pass
    child = os.fork()
    if child == 0:
        code = 1
        signal.alarm(60)
        try:
            with bounded_template():
                while True:
                    pass
        except ConfigError:
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_template_that_ends_late_has_its_own_error() -> None:
    """The watch may look between the template's own error and the end of the block."""

    def render() -> None:
        with template_bounds.bounded_template():
            try:
                while True:
                    pass
            except template_bounds._EndlessError:
                raise RecursionError("its own") from None

    with pytest.raises(RecursionError, match="its own"):
        render()

"""No text of others gives orders to the terminal, by whatever way it is shown; letters and emoji of
all scripts stay.
"""

from __future__ import annotations

import ast
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmtune
from llmtune.cli import main
from llmtune.cli.data import _colored
from llmtune.cli.output import Output
from llmtune.config.compose import compose_config
from llmtune.data.report.statistics import TextSpan
from llmtune.security.terminal import GRAY, GREEN, PLAIN, show_controls, to_json_line, to_terminal
from llmtune.track.console import Console

ORDERS = [
    "\x1b]0;title\x07",
    "\x1b[2J\x1b[H",
    "\x9b31m",
    "\x1b[6n",
    "ok\rBAD",
    "a\x08b",
    "\x7f",
    "\x00",
    "\x1b]8;;http://x\x1b\\",
]
KEPT = [
    "tab\tand\nnewline",
    "שלום ‏ right to left",
    "مرحبا",
    "👩‍💻 🏳️‍🌈",
    "日本語 é ü ß",
    "a\u200db\u00adc",
]
CONTROLS = {chr(code) for code in (*range(32), *range(127, 160))} - {"\t", "\n"}


@given(st.text())
@settings(max_examples=200, derandomize=True, deadline=None)
def test_nothing_is_left_that_a_terminal_obeys_and_nothing_else_is_changed(text: str) -> None:
    shown = show_controls(text)
    assert not CONTROLS & set(shown)
    if not CONTROLS & set(text):
        assert shown == text
    assert show_controls(shown) == shown
    for letters in (True, False):
        line = to_json_line({"a": [text]}, letters=letters)
        assert not (CONTROLS | {"\n"}) & set(line)
        assert json.loads(line) == {"a": [text]}


@pytest.mark.parametrize("text", KEPT)
def test_letters_of_all_scripts_stay(text: str) -> None:
    assert show_controls(text) == text == to_terminal(text)


@pytest.mark.parametrize("text", ORDERS)
def test_every_way_to_the_terminal_spells_controls_out(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = io.StringIO()
    console = Console(out)
    console.say(text)
    console.page(text, {"a": text})
    console.table(text.replace("[", "("), ["a"], [[text]])
    console.progress(text)
    Output(out)(text)
    assert not CONTROLS & set(out.getvalue())
    assert "\\x" in out.getvalue()
    for colors in (True, False):
        shown = _colored([TextSpan(text, True), TextSpan(text, False)], colors)
        assert not CONTROLS & set(shown.replace(GREEN, "").replace(GRAY, "").replace(PLAIN, ""))
    for argument in (f"no_such_key={text}", f"--{text}", text, f"model={text}"):
        assert main.main([argument]) == 2
    captured = capsys.readouterr()
    assert not CONTROLS & set(captured.out + captured.err)


def test_an_answer_of_a_model_gives_no_orders(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Target:
        adapter, model_folder = None, Path("/m")
        config = compose_config(["model=tiny"]).config
        base_name = "m"

    monkeypatch.setattr("llmtune.run.artifact.resolve_target", lambda _: Target)
    monkeypatch.setattr("llmtune.run.artifact.load_model", lambda _: (None, None))
    monkeypatch.setattr("llmtune.data.tokenize.chat_template.check_chat_template", lambda *_: None)
    monkeypatch.setattr(
        "llmtune.model.generate.generate", lambda *_: ["fine\x1b]52;c;cm0gLXJmIH4=\x07 👩‍💻\n\tend"]
    )
    assert main.main(["chat", "model=tiny", "chat.prompt=hello"]) == 0
    assert capsys.readouterr().out == "fine\\x1b]52;c;cm0gLXJmIH4=\\x07 👩‍💻\n\tend\n"


#: What makes a text fit for a terminal, or is one of ours.
SAFE = {"to_terminal", "show_controls"}


def _is_safe(argument: ast.expr) -> bool:
    if isinstance(argument, ast.Call):
        return isinstance(argument.func, ast.Name) and argument.func.id in SAFE
    if isinstance(argument, ast.JoinedStr):
        # Numbers of our own.
        return all(
            isinstance(part, ast.Constant)
            or (
                isinstance(part, ast.FormattedValue)
                and re.fullmatch(
                    r"bad|counted\((bad|len\(reports\)|data\.fatal), '\w+'\)",
                    ast.unparse(part.value),
                )
            )
            for part in argument.values
        )
    return isinstance(argument, ast.Constant)


def test_nothing_is_written_to_the_standard_streams_past_it() -> None:
    past, seen = [], 0
    for file in sorted(
        f
        for folder in ("cli", "run")
        for f in (Path(llmtune.__file__).parent / folder).glob("*.py")
    ):
        for node in ast.walk(ast.parse(file.read_text())):
            call: Any = node
            if isinstance(node, ast.Call) and ast.unparse(call.func) in (
                "sys.stdout.write",
                "sys.stderr.write",
            ):
                seen += 1
                # What libraries wrote goes to the log.
                if not _is_safe(call.args[0]) and "imported.read_text" not in ast.unparse(call):
                    past.append(f"{file.name}:{node.lineno}")
    assert seen > 8
    assert not past

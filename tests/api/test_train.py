"""``llmtune.train`` turns the end of its child into a run or an error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import llmtune
from llmtune.errors import (
    ERRORS_BY_CODE,
    CheckpointError,
    ConfigError,
    LlmtuneError,
    StoppedError,
)
from llmtune.launch.supervise import child_command
from llmtune.launch.supervise.child_command import ChildEnd


class Child:
    """Stands in for the child process."""

    def __init__(self, end: ChildEnd):
        self.end = end
        self.arguments: list[str] = []

    def __call__(self, arguments: Sequence[str], *_: Any, **named: Any) -> ChildEnd:
        self.arguments = list(arguments)
        assert named == {"shows_out": True}
        return self.end


def train(end: ChildEnd, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    child = Child(end)
    monkeypatch.setattr(child_command, "run_child", child)
    try:
        llmtune.train("model=tiny", {"output_dir": folder, "data.train": ["a b.jsonl", "c.jsonl"]})
    finally:
        monkeypatch.undo()
    return child.arguments


@pytest.mark.parametrize(
    ("code", "error"), [*ERRORS_BY_CODE.items(), (1, LlmtuneError), (-9, LlmtuneError)]
)
def test_an_exit_code_is_an_error_of_its_kind(
    code: int, error: type[LlmtuneError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(error) as raised:
        train(ChildEnd(exit_code=code, error="the reason"), tmp_path / "run", monkeypatch)
    assert type(raised.value) is error
    stopped = error is StoppedError or code < 0
    assert ("the same call goes on" if stopped else "the reason") in str(raised.value)


def test_a_child_that_says_nothing_has_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LlmtuneError, match=r"exit code 1; see .*/run/train\.log"):
        train(ChildEnd(exit_code=1), tmp_path / "run", monkeypatch)


def test_a_wrong_configuration_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_command, "run_child", None)
    with pytest.raises(ConfigError, match="did you mean"):
        llmtune.train("model=tinny")


def test_the_command_line_is_what_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtune.api.train.load_run", lambda folder: None)
    found = train(ChildEnd(exit_code=0), tmp_path / "run", monkeypatch)
    assert found == [
        *("train", "model=tiny", f"output_dir='{tmp_path / 'run'}'"),
        "data.train=['a b.jsonl','c.jsonl']",
    ]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run folder"):
        llmtune.load_run(tmp_path)

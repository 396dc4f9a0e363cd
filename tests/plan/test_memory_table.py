"""The table of memory by model, tuner and card has what the plan says."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from scripts import memory_table
from scripts.memory_table import MODELS, TUNERS, make_row, read_rows

ROWS = read_rows(memory_table.PAGE.read_text())


def test_it_has_each_model_with_each_tuner_once() -> None:
    assert list(ROWS) == [(model, tuner) for model in MODELS for tuner in TUNERS]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "tuner"), list(ROWS))
def test_it_has_what_is_planned(model: str, tuner: str) -> None:
    assert ROWS[model, tuner] == make_row(model, tuner), "run python -m scripts.memory_table"


def test_a_table_that_is_behind_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other_row(*names: Any) -> str:
        return f"| `{names[0]}` | 1 | `{names[1]}` | other |"

    monkeypatch.setattr(memory_table, "make_row", other_row)
    monkeypatch.setattr(sys, "argv", ["memory_table", "--check"])
    before = memory_table.PAGE.read_text()
    assert memory_table.main() == 1
    assert "run python -m scripts.memory_table" in capsys.readouterr().err
    assert memory_table.PAGE.read_text() == before

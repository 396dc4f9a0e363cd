"""Every experiment plans on its machine, and the README's table has what the plan says."""

from __future__ import annotations

import sys

import pytest

from llmtune.plan.devices import probe
from scripts import experiments_table
from scripts.experiments_table import list_experiments, make_row, read_rows

ROWS = read_rows(experiments_table.PAGE.read_text())


@pytest.mark.parametrize("name", list_experiments())
def test_the_readme_has_what_is_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of another size: the named one counts."""
    monkeypatch.setattr(probe, "probe_host_memory_bytes", lambda: 7 * 10**12)
    assert ROWS[name] == make_row(name), "run python -m scripts.experiments_table"


def test_the_table_has_each_experiment_once_and_none_that_is_gone() -> None:
    page = experiments_table.PAGE.read_text()
    assert list(ROWS) == list_experiments()
    assert all(page.count(f"| `{name}` |") == 1 for name in ROWS)


@pytest.mark.parametrize("name", list_experiments())
def test_the_first_line_is_the_command(name: str) -> None:
    file = experiments_table.ROOT / "conf/experiment" / f"{name}.yaml"
    package, command = file.read_text().splitlines()[:2]
    assert package == "# @package _global_"
    assert f"{command} ".startswith(f"# python -m llmtune experiment={name} ")


def test_a_table_that_is_behind_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiments_table, "list_experiments", lambda: ["llama2_7b_lora_1gpu"])
    monkeypatch.setattr(experiments_table, "make_row", lambda name: f"| `{name}` | other |")
    monkeypatch.setattr(sys, "argv", ["experiments_table", "--check"])
    before = experiments_table.PAGE.read_text()
    assert experiments_table.main() == 1
    assert "run python -m scripts.experiments_table" in capsys.readouterr().err
    assert experiments_table.PAGE.read_text() == before

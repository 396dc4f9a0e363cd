"""Runs are compared by what they reached, at which cost, and by the settings that differ."""

from __future__ import annotations

from pathlib import Path

from llmtune.report.compare_page import build_compare_page, compare_runs
from llmtune.report.run_facts import read_run
from llmtune.report.settings_table import find_differences
from tests.report.run_folder import make_run


def test_only_settings_that_differ_are_listed() -> None:
    one = {"model": {"name": "a"}, "train": {"lr": 1, "steps": 5}, "run_name": "x"}
    two = {"model": {"name": "a"}, "train": {"lr": 2}, "run_name": "y", "runs": {"dry_run": True}}
    assert find_differences([one, two]) == {
        "train.lr": ["1", "2"],
        "train.steps": ["5", "not set"],
    }
    assert find_differences([one, one, one]) == {}


def test_every_run_has_its_numbers_and_its_color(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / name, name)) for name in ("one", "two", "three")]
    compared = compare_runs(runs)
    assert compared.names == ["one", "two", "three"]
    rows = {name: cells for name, *cells in compared.results}
    assert rows["loss"] == ["0.25"] * 3
    assert rows["eval_one"] == ["0.5", "-", "-"]
    assert rows["memory_bytes"] == ["500 B"] * 3
    assert list(rows)[:5] == ["folder", "state", "step", "loss", "eval_loss"]
    page = build_compare_page(runs)
    (loss,) = [chart for chart in page.charts if chart.title == "Training loss"]
    assert [name in loss.text for name in compared.names] == [True] * 3
    assert loss.table is not None
    assert len(loss.table.rows) == 3

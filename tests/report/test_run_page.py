"""The page of a run has what its folder has, and stays small."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from llmtune.report.html import render_page
from llmtune.report.page import Chart, Table
from llmtune.report.run_facts import read_run
from llmtune.report.run_page import build_run_page
from tests.report.run_folder import make_run

#: Bytes of the script of vl-convert 1.9, and the bound of a whole page.
SCRIPT_BYTES, MOST_BYTES = 900_000, 2_000_000


def test_a_page_has_every_section(tmp_path: Path) -> None:
    page = build_run_page(read_run(make_run(tmp_path / "run")))
    assert [section.name for section in page.sections] == [
        *("curves", "planned", "events", "time", "data", "classes", "answers", "load", "settings")
    ]
    charts = {chart.title for chart in page.charts}
    assert charts >= {"Loss", "Held-out accuracy", "Learning rate", "Gradient norm", "Throughput"}
    assert charts >= {"Memory", "Events", "Which classes were taken for which"}
    assert len({chart.name for chart in page.charts}) == len(page.charts)


def test_what_is_not_there_has_no_section(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", confusion_matrix=None, samples=None, data_examples=None)
    names = [section.name for section in build_run_page(read_run(run)).sections]
    assert not {"classes", "answers"} & set(names)
    (run / "metrics.jsonl").unlink()
    page = build_run_page(read_run(run))
    assert "curves" not in [section.name for section in page.sections]
    assert render_page(page, "the script")


def test_restarts_and_fallbacks_are_on_the_curve_and_in_the_list(tmp_path: Path) -> None:
    page = build_run_page(read_run(make_run(tmp_path / "run")))
    (loss,) = [chart for chart in page.charts if chart.name == "loss"]
    assert "At step 2: fallback" in loss.text
    assert "At step 3: restart" in loss.text
    spec = json.dumps(loss.spec)
    assert '"step": 2' in spec
    assert '"rule"' in spec
    (events,) = [section for section in page.sections if section.name == "events"]
    (table,) = [block for block in events.blocks if isinstance(block, Table)]
    assert [row[1] for row in table.rows] == ["fallback", "restart", "failed"]


def test_a_curve_says_its_values_in_words_and_in_a_table(tmp_path: Path) -> None:
    page = build_run_page(read_run(make_run(tmp_path / "run")))
    (loss,) = [chart for chart in page.charts if chart.name == "loss"]
    assert loss.text.startswith("Loss. training: 2 at step 1, 0.25 at step 8.")
    assert loss.table is not None
    assert list(loss.table.rows[0]) == ["training", "2", "0.25", "2", "0.25"]


@pytest.mark.parametrize("steps", [20_000])
def test_a_long_run_with_many_metrics_stays_below_two_megabytes(steps: int, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    metrics = [f"eval_{name}" for name in ("loss", "f1", "recall", "precision", "auroc", "mcc")]
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            value = 1 + math.sin(step) / 3
            keys = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "memory_bytes")
            keys += ("save_pause_seconds", *(metrics if step % 10 == 0 else ()))
            file.write(json.dumps({"step": step, **dict.fromkeys(keys, value)}) + "\n")
    page = build_run_page(read_run(run))
    assert len(render_page(page, "x" * SCRIPT_BYTES)) < MOST_BYTES
    (loss,) = [chart for chart in page.charts if isinstance(chart, Chart) and chart.name == "loss"]
    assert f"at step {steps:,}" in loss.text

"""The results of a sweep, as values and as a page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import vl_convert

from llmtune.report.html import render_page
from llmtune.report.write import write_page
from llmtune.sweep.page import build_sweep_page
from llmtune.sweep.results import SweepResults, read_results
from llmtune.sweep.runner import TrialCommand
from llmtune.sweep.space import Parameter
from llmtune.sweep.trial import Trial, TrialEnd, TrialState
from tests.report.test_browser import BROWSER, open_page
from tests.report.test_html import HOSTILE
from tests.sweep.fakes import SPACE, FakeRunner, make_loop, make_study

COMMAND = TrialCommand(
    overrides=["model=tiny", "data.train=a b.jsonl"], plan_overrides=[], config_dir=None, name="x"
)


def make_results(folder: Path, trials: int = 12, text: str = "out of memory") -> SweepResults:
    def end(trial: Trial) -> TrialEnd | None:
        failed = TrialEnd(state=TrialState.failed, reason=text, exit_code=3)
        return failed if trial.number == 1 else None

    study = make_study(folder)
    make_loop(study, FakeRunner(end), trials).run()
    return read_results(study, folder, trials, COMMAND)


def test_the_values_are_those_of_the_study(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    values = json.loads(json.dumps(results.to_json()))
    assert values["state"] == "finished"
    assert values["goal"] == "min eval_loss"
    assert [trial["number"] for trial in values["trials"]] == list(range(12))
    losses = [t["eval_loss"] for t in values["trials"] if t["state"] == "finished"]
    best = values["best"]
    assert best["eval_loss"] == min(losses)
    assert best["folder"] == f"{tmp_path}/trial-{best['number']:04d}"
    assert best["command"].startswith("python -m llmtune train model=tiny 'data.train=a b.jsonl'")
    assert f"optim.learning_rate={best['settings']['optim.learning_rate']!r}" in best["command"]
    assert values["trials"][1]["reason"] == "out of memory"
    assert set(values["importance"]) == {parameter.key for parameter in SPACE}
    assert make_results(tmp_path).trials == results.trials


def test_the_page_has_every_trial_and_its_pictures(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    page = build_sweep_page(results)
    assert [section.name for section in page.sections] == [
        *("best", "importance", "pictures", "trials", "space")
    ]
    assert [chart.name for chart in page.charts] == ["importance", "parallel", "history"]
    finished = sum(trial.state is TrialState.finished for trial in results.trials)
    _, parallel, history = page.charts
    assert parallel.text.startswith(f"A line for each of {finished} finished trials through optim.")
    assert f"{results.best.value:.6g} at the end" in history.text if results.best else False
    html = render_page(page, "the script")
    assert "out of memory" in html
    assert results.best_command.replace("'", "&#39;") in html
    for chart in page.charts:
        drawn = vl_convert.vegalite_to_svg(chart.spec)
        assert drawn.count("<path") > 5, chart.name


def test_lines_go_from_axis_to_axis(tmp_path: Path) -> None:
    results = make_results(tmp_path)
    spec: Any = build_sweep_page(results).charts[1].spec
    rows = spec["layer"][1]["data"]["values"]
    for trial in results.trials:
        own = {row["axis"]: row for row in rows if row["trial"] == trial.number}
        if trial.state is not TrialState.finished:
            assert own == {}
            continue
        assert list(own) == [*(p.key for p in SPACE), "eval_loss"]
        assert all(0 <= row["height"] <= 1 for row in own.values())
        rank = own["tuner.lora_r"]
        assert rank["height"] == {8: 0, 16: 0.5, 32: 1}[trial.values["tuner.lora_r"]]  # type: ignore[index]
        assert rank["set"] == str(trial.values["tuner.lora_r"])
    heights = {row["trial"]: row["height"] for row in rows if row["axis"] == "eval_loss"}
    assert results.best is not None
    assert heights[results.best.number] == min(heights.values()) == 0
    assert {row["rank"] for row in rows if row["trial"] == results.best.number} == {0}


@pytest.mark.parametrize("trials", [0, 1, 2, 3])
def test_a_sweep_that_has_just_begun_has_a_page_too(trials: int, tmp_path: Path) -> None:
    page = build_sweep_page(make_results(tmp_path, trials))
    assert page.sections[0].name == "best"
    render_page(page, "the script")
    for chart in page.charts:
        vl_convert.vegalite_to_svg(chart.spec)


def test_one_choice_and_equal_values_are_drawn(tmp_path: Path) -> None:
    study = make_study(tmp_path, [Parameter(key="tuner.bias", choices=("none",))])
    done = TrialEnd(state=TrialState.finished, value=1.0)
    make_loop(study, FakeRunner(lambda _: done), 1).run()
    page = build_sweep_page(read_results(study, tmp_path, 1, COMMAND))
    for chart in page.charts:
        vl_convert.vegalite_to_svg(chart.spec)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(not BROWSER, reason="this machine has no Chromium")
@pytest.mark.parametrize("text", ["plain", HOSTILE[0], HOSTILE[3]])
def test_a_browser_draws_it_without_an_error_or_a_request(text: str, tmp_path: Path) -> None:
    page = build_sweep_page(make_results(tmp_path, text=text))
    file = tmp_path / "page.html"
    write_page(page, file, tmp_path / "cache")
    assert file.stat().st_size < 2_000_000
    found, reported = open_page(file, tmp_path / "profile")
    drawn = re.sub(r"<script.*?</script>", "", found, flags=re.DOTALL)
    assert len(re.findall(r"<svg[ >]", drawn)) == len(page.charts) == 3
    assert [line for line in reported.splitlines() if "CONSOLE" in line] == []

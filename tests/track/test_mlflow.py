"""MLflow's store, queried with its own client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtune.config.groups.tracker import TrackerConfig
from llmtune.storage import layout
from llmtune.track.service import open_services
from llmtune.track.services.mlflow import MlflowTracker
from llmtune.track.tracker import Outcome, Trackers
from tests.track.records import record, tracked_run

mlflow: Any = pytest.importorskip("mlflow")
pytestmark = pytest.mark.process


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def track(folder: Path, outcome: Outcome, *records: dict[str, Any], **more: Any) -> None:
    said: list[str] = []
    run = tracked_run(folder, said, config=TrackerConfig(kind="mlflow", project="mine"), **more)
    trackers = Trackers(open_services(run), said.append)
    for one in records:
        trackers.log(one)
    trackers.summarize({"best_step": 1})
    trackers.finish(outcome)
    assert said == []


def runs_in(folder: Path) -> tuple[Any, list[Any]]:
    client = mlflow.MlflowClient(f"sqlite:///{folder / layout.MLFLOW}/mlflow.db")
    experiment = client.get_experiment_by_name("mine")
    return client, client.search_runs([experiment.experiment_id])


def test_settings_plan_and_numbers_are_in_the_store(tmp_path: Path) -> None:
    settings = {"seed": 1, "model": {"name_or_path": "tiny", "config": {}}, "long": "x" * 9000}
    settings |= {f"key_{number}": number for number in range(250)}
    track(
        tmp_path,
        Outcome.finished,
        record(1, grad_norm=float("inf"), note="text"),
        record(2, eval_loss=1.25),
        settings=settings,
        plan={"placement": {"zero_stage": 3}},
    )
    client, (run,) = runs_in(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert run.data.params["model.name_or_path"] == "tiny"
    assert run.data.params["key_249"] == "249"
    assert len(run.data.params["long"]) == 6000
    assert run.data.tags["best_step"] == "1"
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert {one.step: one.value for one in losses} == {1: 3.0, 2: 1.5}
    assert run.data.metrics["eval_loss"] == 1.25
    assert "grad_norm" not in run.data.metrics
    assert [one.path for one in client.list_artifacts(run.info.run_id)] == ["plan.json"]


def test_the_next_start_goes_on_with_the_run(tmp_path: Path) -> None:
    states = []
    for number, outcome in enumerate((Outcome.stopped, Outcome.failed, Outcome.finished)):
        # The last step of the start before is behind its checkpoint, and is done again.
        records = [record(step) for step in range(max(1, number), number + 2)]
        track(tmp_path, outcome, *records, first_step=number, settings={"seed": number})
        client, (run,) = runs_in(tmp_path)
        states.append(run.info.status)
    assert states == ["KILLED", "FAILED", "FINISHED"]
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert sorted(one.step for one in losses) == [1, 2, 3]


def test_a_run_that_is_killed_has_failed(tmp_path: Path) -> None:
    """The process with the client sees that nobody says how the run has ended."""
    run = tracked_run(tmp_path, [], config=TrackerConfig(kind="mlflow", project="mine"))
    tracker = MlflowTracker(run)
    tracker.log(record(1))
    tracker._process.close()
    _, (found,) = runs_in(tmp_path)
    assert found.info.status == "FAILED"
    assert found.data.metrics["loss"] == 3.0


def test_the_next_start_writes_what_an_earlier_one_could_not(tmp_path: Path) -> None:
    """That one was killed before MLflow had its steps, or MLflow itself was."""
    track(tmp_path, Outcome.failed, record(2))
    lines = [json.dumps(record(step, eval_loss=2.0 * step)) for step in (0, 1, 2, 3, 4)]
    (tmp_path / layout.METRICS).write_text("\n".join(lines) + "\n")
    track(tmp_path, Outcome.finished, record(4), record(5), first_step=3)
    client, (run,) = runs_in(tmp_path)
    losses = [one.step for one in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(losses) == [0, 1, 2, 3, 4, 5]
    evaluations = [one.step for one in client.get_metric_history(run.info.run_id, "eval_loss")]
    assert sorted(evaluations) == [0, 1, 2, 3]

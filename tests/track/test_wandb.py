"""Weights & Biases without a key and without a network, read back from its own file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmtune.config.groups.tracker import TrackerConfig, TrackerMode
from llmtune.track.service import open_services
from llmtune.track.tracker import Outcome, Trackers
from tests.track.records import record, tracked_run
from tests.track.wandb_file import read_histories, read_wandb


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def track(folder: Path, said: list[str], mode: TrackerMode = TrackerMode.offline) -> Trackers:
    config = TrackerConfig(kind="wandb", mode=mode)
    run = tracked_run(folder, said, config=config, plan={"placement": {"rung": "none"}})
    return Trackers(open_services(run), said.append)


def read_run(folder: Path) -> dict[str, Any]:
    """What W&B knows of the one start that was tracked into a folder."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    found: dict[str, Any] = {"summary": set(), "histories": read_histories(file)}
    for entry in read_wandb(file):
        match entry.WhichOneof("record_type"):
            case "run":
                found["id"] = entry.run.run_id
                found["config"] = {item.key: item.value_json for item in entry.run.config.update}
            case "summary":
                found["summary"] |= {item.key for item in entry.summary.update}
            case "exit":
                found["exit"] = entry.exit.exit_code
    return found


@pytest.mark.process
def test_wandb_tracks_offline_without_a_key(tmp_path: Path) -> None:
    said: list[str] = []
    trackers = track(tmp_path, said, TrackerMode.online)
    for step in (1, 2):
        trackers.log(record(step))
    trackers.log({"step": 2, "eval_loss": 1.25})
    trackers.summarize({"best_step": 1, "best_eval_loss": 2.0})
    trackers.finish(Outcome.finished)
    (note,) = said
    assert "tracked offline" in note

    found = read_run(tmp_path)
    assert found["id"] == (tmp_path / "wandb" / "run_id").read_text()
    assert found["config"]["seed"] == "1"
    assert json.loads(found["config"]["plan"]) == {"placement": {"rung": "none"}}
    assert {step: values["loss"] for step, values in found["histories"].items()} == {1: 3, 2: 1.5}
    assert found["histories"][2]["eval_loss"] == 1.25
    assert found["summary"] >= {"best_step", "best_eval_loss"}
    assert found["exit"] == 0


@pytest.mark.process
def test_a_failure_is_shown_as_one_and_the_next_start_continues_the_run(tmp_path: Path) -> None:
    ids, codes, steps = set(), [], []
    for number, outcome in enumerate((Outcome.failed, Outcome.finished)):
        said: list[str] = []
        trackers = track(tmp_path, said)
        trackers.log(record(number + 1))
        trackers.finish(outcome)
        assert said == []
        found = read_run(tmp_path)
        ids.add(found["id"])
        codes.append(found["exit"])
        steps += found["histories"]
        (folder,) = tmp_path.glob("wandb/offline-run-*")
        folder.rename(tmp_path / f"start-{number}")
    assert len(ids) == 1
    assert codes == [1, 0]
    assert steps == [1, 2]


@pytest.mark.process
def test_wandbs_service_may_be_killed(tmp_path: Path) -> None:
    said: list[str] = []
    trackers = track(tmp_path, said)
    trackers.log(record(1))
    until = time.monotonic() + 60
    while not list(tmp_path.glob("wandb/offline-run-*/*.wandb")) and time.monotonic() < until:
        time.sleep(0.05)
    # One service serves all runs of a process.
    children = psutil.Process().children(recursive=True)
    service = [process for process in children if process.name().startswith("wandb")]
    assert service
    for process in service:
        process.kill()
    started = time.monotonic()
    for step in range(2, 20):
        trackers.log(record(step))
        time.sleep(0.05)
    trackers.finish(Outcome.finished)
    assert time.monotonic() - started < 30
    (note,) = said
    assert note.startswith("W&B ")
    assert "is left out (" in note

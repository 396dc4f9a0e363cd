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
from llmtune.storage import layout
from llmtune.storage.rank_files import FinishedRecord
from llmtune.track.service import find_service_problems, open_services
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


def find_ended(folder: Path) -> Path:
    """The file of the one start that was tracked into a folder.

    On a busy machine W&B's service writes its last block after the run was told that it is closed.
    """
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if any(entry.WhichOneof("record_type") == "exit" for entry in read_wandb(file)):
            break
        time.sleep(0.1)
    return file


def read_run(folder: Path) -> dict[str, Any]:
    """What W&B knows of the one start that was tracked into a folder."""
    file = find_ended(folder)
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


def finish_run(folder: Path) -> None:
    """What a finished run with a best checkpoint leaves: small files with real names."""
    files = {
        "adapter/adapter_model.safetensors": "weights",
        "adapter/adapter_config.json": "{}",
        "checkpoint-4/adapter_model.safetensors": "better weights",
        "checkpoint-4/optimizer-00000-of-00001.safetensors": "state",
        "checkpoint-6/adapter_model.safetensors": "weights",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    best = {"metric": "eval_loss", "value": 1.0, "step": 4}
    FinishedRecord(step=6, best=best, published_step=6).write(folder)


def track_files(folder: Path, outcome: Outcome, **settings: Any) -> tuple[list[str], set[str]]:
    """What was said, and the stored files as ``artifact/name``."""
    said: list[str] = []
    config = TrackerConfig(kind="wandb", mode=TrackerMode.offline, **settings)
    report = folder / layout.REPORT
    run = tracked_run(
        folder, said, config=config, write_report=lambda: bool(report.write_text("page"))
    )
    trackers = Trackers(open_services(run), said.append)
    trackers.log(record(1))
    trackers.finish(outcome)
    file = find_ended(folder)
    stored = set()
    for entry in read_wandb(file):
        found = entry.artifact
        if entry.WhichOneof("record_type") != "artifact":
            found = entry.request.log_artifact.artifact
        for item in found.manifest.contents:
            name = found.name.rpartition("-")[0]
            assert Path(item.local_path).is_file(), "wandb sync would not find it"
            stored.add(f"{name}/{item.path} {','.join(sorted(found.aliases))}")
    return said, stored


@pytest.mark.process
def test_files_of_a_finished_run_are_stored_when_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    run = tmp_path / "run"
    finish_run(run)
    said, stored = track_files(run, Outcome.finished, artifacts=True)
    assert said == []
    assert stored == {
        "adapter/adapter_model.safetensors latest",
        "adapter/adapter_config.json latest",
        "checkpoint/adapter_model.safetensors best,latest,step-4",
        "report/report.html latest",
    }
    # Weights are sent from where they are, and not copied.
    copies = [file.name for file in (tmp_path / "data").rglob("*") if file.is_file()]
    assert len(copies) <= 1


@pytest.mark.process
def test_what_is_too_large_is_named_and_the_rest_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    run = tmp_path / "run"
    finish_run(run)
    said, stored = track_files(
        run, Outcome.finished, artifacts=True, artifact_max_bytes=len("better weights") - 1
    )
    (note,) = said
    assert "W&B: the checkpoint of 14 B is not stored: tracker.artifact_max_bytes=13" in note
    assert {name.partition("/")[0] for name in stored} == {"adapter", "report"}


@pytest.mark.process
@pytest.mark.parametrize(
    ("outcome", "settings"),
    [(Outcome.finished, {}), (Outcome.stopped, {"artifacts": True})],
    ids=["not asked", "not finished"],
)
def test_otherwise_none_is_stored(
    outcome: Outcome, settings: dict[str, Any], tmp_path: Path
) -> None:
    finish_run(tmp_path)
    assert track_files(tmp_path, outcome, **settings) == ([], set())


@pytest.mark.process
def test_a_file_that_cannot_be_stored_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    run = tmp_path / "run"
    finish_run(run)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no room")

    wandb: Any = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb.Artifact, "add_file", refuse)
    said, stored = track_files(run, Outcome.finished, artifacts=True)
    assert stored == set()
    assert len(said) == 3
    assert f"W&B: the adapter is not stored (OSError: no room); it is in {run}/adapter" in said
    assert read_run(run)["exit"] == 0


def test_its_keys_are_for_wandb_alone_and_the_size_is_one() -> None:
    (problem,) = find_service_problems(TrackerConfig(kind="tensorboard", artifacts=True))
    assert "tracker.artifacts=True is only read by W&B" in problem
    (problem,) = find_service_problems(TrackerConfig(kind="wandb", artifact_max_bytes="much"))
    assert "tracker.artifact_max_bytes=much: bytes as an integer" in problem


@pytest.mark.process
def test_wandbs_service_may_be_killed(tmp_path: Path) -> None:
    """The last test of this file: one service serves all runs of a process."""
    said: list[str] = []
    trackers = track(tmp_path, said)
    trackers.log(record(1))
    until = time.monotonic() + 60
    while not list(tmp_path.glob("wandb/offline-run-*/*.wandb")) and time.monotonic() < until:
        time.sleep(0.05)
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

"""TensorBoard's events, read back by its own reader."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from llmtune.config.groups.tracker import TrackerConfig
from llmtune.storage import layout
from llmtune.track.service import open_services
from llmtune.track.tracker import Outcome, Trackers
from tests.track.records import record, tracked_run

event_accumulator: Any = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator"
)


def track(folder: Path, said: list[str], **more: Any) -> Trackers:
    run = tracked_run(folder, said, config=TrackerConfig(kind="tensorboard"), **more)
    return Trackers(open_services(run), said.append)


def read_scalars(run: Path) -> dict[str, dict[int, float]]:
    events = event_accumulator.EventAccumulator(str(run / layout.TENSORBOARD))
    events.Reload()
    return {
        key: {event.step: event.value for event in events.Scalars(key)}
        for key in events.Tags()["scalars"]
    }


def test_every_number_is_a_scalar_of_its_step(tmp_path: Path) -> None:
    said: list[str] = []
    trackers = track(tmp_path, said)
    trackers.log(record(1, grad_norm=float("inf"), is_new=True, note="text", nothing=None))
    trackers.log(record(2, data_seconds=0.25))
    trackers.log({"step": 2, "eval_loss": 1.5})
    trackers.summarize({"best_step": 2})
    trackers.finish(Outcome.finished)
    assert said == []
    found = read_scalars(tmp_path)
    assert found.pop("grad_norm") == {1: math.inf}
    assert found == {
        "loss": {1: 3.0, 2: 1.5},
        "tokens_per_second": {1: 5.0, 2: 5.0},
        "memory_bytes": {1: 1e9, 2: 1e9},
        "data_seconds": {2: 0.25},
        "eval_loss": {2: 1.5},
    }


def test_a_resumed_run_replaces_the_steps_that_it_does_again(tmp_path: Path) -> None:
    said: list[str] = []
    trackers = track(tmp_path, said)
    for step in range(1, 6):
        trackers.log(record(step))
    trackers.finish(Outcome.failed)
    trackers = track(tmp_path, said, first_step=2)
    for step in range(3, 8):
        trackers.log(record(step, loss=100.0 + step))
    trackers.finish(Outcome.finished)
    assert said == []
    assert read_scalars(tmp_path)["loss"] == {1: 3, 2: 1.5, 3: 103, 4: 104, 5: 105, 6: 106, 7: 107}


def test_a_folder_that_cannot_be_written_to_costs_the_tracker_alone(tmp_path: Path) -> None:
    # A file in its place, because root may write to every folder.
    (tmp_path / layout.TENSORBOARD).touch()
    said: list[str] = []
    trackers = track(tmp_path, said)
    trackers.log(record(1))
    trackers.finish(Outcome.finished)
    (note,) = said
    assert note.startswith("TensorBoard cannot be opened and is left out (")

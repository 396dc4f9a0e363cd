"""Trackio's database, read back with its own reader."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from llmtune.config.groups.tracker import TrackerConfig
from llmtune.track.service import open_services
from llmtune.track.tracker import Outcome, Trackers
from tests.track.records import record, tracked_run


def test_every_start_adds_to_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "database"))
    pytest.importorskip("trackio")
    storage: Any = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    said: list[str] = []
    for first, outcome in ((0, Outcome.failed), (2, Outcome.finished)):
        config = TrackerConfig(kind="trackio", project="mine")
        run = tracked_run(tmp_path / "run", said, config=config, first_step=first)
        trackers = Trackers(open_services(run), said.append)
        trackers.log(record(first + 1))
        trackers.log(record(first + 2, eval_loss=1.25))
        trackers.finish(outcome)
    assert said == []
    (name,) = storage.get_runs("mine")
    assert name.startswith("first-")
    rows = storage.get_logs("mine", name)
    assert {row["step"]: row["loss"] for row in rows if "loss" in row} == {
        step: 3.0 / step for step in range(1, 5)
    }
    assert [row["eval_loss"] for row in rows if "eval_loss" in row] == [1.25, 1.25]

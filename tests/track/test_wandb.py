"""Weights & Biases without a key and without a network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from llmtune.config.groups.tracker import TrackerConfig, TrackerMode
from llmtune.track.service import SERVICES, TrackedRun
from tests.track.records import record


@pytest.mark.process
def test_wandb_tracks_offline_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    config, said = TrackerConfig(kind="wandb", mode=TrackerMode.online), list[str]()
    tracker = SERVICES.find("wandb").open(
        TrackedRun(
            config=config, folder=tmp_path, name="name", settings={"seed": 1}, say=said.append
        )
    )
    assert any("tracked offline" in text for text in said)
    tracker.log(record(1))
    service: Any = tracker
    service.summarize({"best_step": 1, "best_eval_loss": 2.0})
    assert service._run.summary["best_eval_loss"] == 2.0
    tracker.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert (tmp_path / "wandb" / "run_id").read_text()

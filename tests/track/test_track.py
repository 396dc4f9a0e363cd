"""Metrics on disk, the progress line, the plot, and trackers that fail."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmtune.config.groups.tracker import TrackerConfig, TrackerMode
from llmtune.track.console import Console, ProgressLine
from llmtune.track.metrics import MetricsFile, cut_metrics, read_metrics
from llmtune.track.plot import write_loss_plot
from llmtune.track.service import SERVICES, TrackedRun
from llmtune.track.tracker import Trackers


def line(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 3.0 / step,
        "tokens_per_second": 5.0,
        "memory_bytes": 10**9,
        **more,
    }


def test_lines_beyond_the_checkpoint_and_half_lines_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.log({"step": 0, "eval_loss": 4.0})
    for step in range(1, 8):
        file.log(line(step))
    file.finish()
    path.write_text(path.read_text() + '{"step": 8, "lo')
    cut_metrics(path, 5)
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3, 4, 5]
    cut_metrics(path, -1)
    assert path.read_text() == ""


def test_numbers_are_not_rounded(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.log({"step": 1, "loss": 0.1 + 0.2})
    file.finish()
    assert json.loads((tmp_path / "m.jsonl").read_text())["loss"] == 0.1 + 0.2


def test_what_is_not_finite_is_null_because_json_has_no_infinity(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.log({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
    }


def test_a_failing_tracker_is_left_out_and_the_others_go_on() -> None:
    class Broken:
        def log(self, record: Any) -> None:
            raise OSError("no network")

        def finish(self) -> None:
            raise OSError("no network")

    class Counts:
        seen = 0

        def log(self, record: Any) -> None:
            self.seen += 1

        def finish(self) -> None:
            self.seen += 100

    counts = Counts()
    said: list[str] = []
    trackers = Trackers([Broken(), counts], said.append)
    trackers.log(line(1))
    trackers.log(line(2))
    trackers.finish()
    assert counts.seen == 102
    assert len(said) == 1
    assert said[0].startswith("the tracker Broken failed and is left out (")


def test_the_progress_line_has_what_a_person_looks_for() -> None:
    out = io.StringIO()
    progress = ProgressLine(Console(out), total_steps=2)
    progress.log({"step": 0, "eval_loss": 3.5, "eval_perplexity": 33.1})
    progress.log(line(1))
    progress.log(line(2))
    text = out.getvalue()
    assert "step 0/2  held-out loss 3.5000  perplexity 33.10" in text
    for part in ("step 2/2", "loss 1.5000", "5 tokens/s", "ETA 0:00", "memory 1.0 GB"):
        assert part in text


def test_the_time_left_is_that_of_steps_and_not_of_what_came_before_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, clock = io.StringIO(), [0.0]
    monkeypatch.setattr("llmtune.track.console.time", SimpleNamespace(monotonic=lambda: clock[0]))
    progress = ProgressLine(Console(out), total_steps=30)
    for step, seconds in ((10, 1000.0), (11, 1040.0), (12, 1080.0), (30, 1800.0)):
        clock[0] = seconds
        progress.log(line(step))
    found = [text.partition("ETA ")[2].split()[0] for text in out.getvalue().splitlines()]
    assert found == ["-", "12:40", "12:00", "0:00"]


def test_brackets_in_answers_are_no_markup() -> None:
    out = io.StringIO()
    Console(out).table("t", ["a"], [["x[0] [bold]y[/bold]"]])
    assert "x[0] [bold]y[/bold]" in out.getvalue()


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    write_loss_plot(tmp_path / "m.jsonl", tmp_path / "loss.png", "t")
    assert not (tmp_path / "loss.png").exists()
    file.log({"step": 0, "eval_loss": 4.0})
    file.log(line(1))
    write_loss_plot(tmp_path / "m.jsonl", tmp_path / "loss.png", "t")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


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
    tracker.log(line(1))
    service: Any = tracker
    service.summarize({"best_step": 1, "best_eval_loss": 2.0})
    assert service._run.summary["best_eval_loss"] == 2.0
    tracker.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert (tmp_path / "wandb" / "run_id").read_text()


def test_a_reader_that_went_away_ends_nothing() -> None:
    """``llmtune | tee log``: Ctrl-C ends tee before the ranks have saved."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as stream:
        console = Console(stream)
        for _ in range(2):
            console.say("saving")
            console.page("title", {"a": "b"})
            console.table("title", ["x"], [["y"]])

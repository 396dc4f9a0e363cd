"""The plot of the losses."""

from __future__ import annotations

from pathlib import Path

from llmtune.track.metrics import MetricsFile
from llmtune.track.plot import write_loss_plot
from tests.track.records import record


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    write_loss_plot(tmp_path / "m.jsonl", tmp_path / "loss.png", "t")
    assert not (tmp_path / "loss.png").exists()
    file.log({"step": 0, "eval_loss": 4.0})
    file.log(record(1))
    write_loss_plot(tmp_path / "m.jsonl", tmp_path / "loss.png", "t")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"

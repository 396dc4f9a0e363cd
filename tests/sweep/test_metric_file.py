"""Following the evaluations of a run that trains elsewhere."""

from __future__ import annotations

import json
import math
from pathlib import Path

from llmtune.sweep.metric_file import MetricFile
from llmtune.track.metrics import cut_metrics


def line(step: int, **values: float | None) -> str:
    return json.dumps({"step": step, **values}) + "\n"


def test_only_new_evaluations_are_read(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    follower = MetricFile(file, "eval_loss")
    assert follower.read_new() == []
    file.write_text(line(0, eval_loss=9.0) + line(1, loss=3.0) + line(2, eval_loss=2.0))
    assert follower.read_new() == [(2, 2.0)]
    assert follower.read_new() == []
    whole = line(4, eval_loss=1.5)
    with file.open("a") as stream:
        stream.write(line(3, loss=1.0) + whole[:7])
    assert follower.read_new() == []
    with file.open("a") as stream:
        stream.write(whole[7:] + "damaged\n" + line(6, eval_loss=None))
    (good, bad) = follower.read_new()
    assert good == (4, 1.5)
    assert bad[0] == 6
    assert math.isnan(bad[1])


def test_a_file_that_is_cut_is_read_from_its_beginning(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(line(step, eval_loss=float(step)) for step in (2, 4, 6)))
    follower = MetricFile(file, "eval_loss")
    assert len(follower.read_new()) == 3
    cut_metrics(file, 4)
    with file.open("a") as stream:
        stream.write(line(6, eval_loss=5.0))
    assert follower.read_new() == [(2, 2.0), (4, 4.0), (6, 5.0)]


def test_other_metrics_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(line(2, eval_loss=1.0, eval_f1=0.5) + line(4, eval_loss=1.0))
    assert MetricFile(file, "eval_f1").read_new() == [(2, 0.5)]

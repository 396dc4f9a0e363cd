"""Metrics on disk: unrounded, and cut at the step that a run resumes from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from llmtune.track.metrics import MetricsFile, cut_metrics, read_metrics
from llmtune.track.tracker import Outcome
from tests.track.records import record


def test_lines_beyond_the_checkpoint_and_half_lines_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.log({"step": 0, "eval_loss": 4.0})
    for step in range(1, 8):
        file.log(record(step))
    file.finish(Outcome.finished)
    path.write_text(path.read_text() + '{"step": 8, "lo')
    cut_metrics(path, 5)
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3, 4, 5]
    cut_metrics(path, -1)
    assert path.read_text() == ""


def test_numbers_are_not_rounded(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.log({"step": 1, "loss": 0.1 + 0.2})
    file.finish(Outcome.finished)
    assert json.loads((tmp_path / "m.jsonl").read_text())["loss"] == 0.1 + 0.2


def test_what_is_not_finite_is_null_because_json_has_no_infinity(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.log({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
    }


def test_metrics_are_cut_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.jsonl"
    text = "".join(f'{{"step": {step}}}\n' for step in range(1, 5))
    file.write_text(text + '{"step": 5')

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="No space"):
            cut_metrics(file, 2)
    assert file.read_text() == text + '{"step": 5'
    cut_metrics(file, 2)
    assert file.read_text() == text[: len(text) // 2]

"""``eval`` and ``chat`` on GPUs: where the weights go, and how many rows go through them at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmtune.cli.eval import AUTO_EVAL_ROWS, auto_eval_rows
from llmtune.cli.target import place_weights

GIB = 2**30


@pytest.mark.parametrize(
    ("gib", "free", "expected"),
    [(13, 79, {"": "cuda:0"}), (59, 79, {"": "cuda:0"}), (60, 79, "auto"), (141, 79, "auto")],
)
def test_a_model_that_is_larger_than_a_gpu_is_spread(
    gib: int, free: int, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("model-1.safetensors", gib * GIB - 5), ("model-2.safetensors", 5)):
        with (tmp_path / name).open("wb") as file:
            # Only its length is looked at.
            file.truncate(size)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    module = SimpleNamespace(mem_get_info=lambda _: (free * GIB, 80 * GIB))
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    assert place_weights(tmp_path) == expected


@pytest.mark.parametrize(
    ("length", "vocabulary", "free", "rows"),
    [
        (8192, 128_256, 60e9, 1),
        (2048, 128_256, 60e9, 5),
        (256, 128_256, 60e9, AUTO_EVAL_ROWS),
        (8192, 32_000, 60e9, 5),
        (131_072, 128_256, 20e9, 1),
    ],
)
def test_rows_are_as_many_as_their_logits_leave_room_for(length: int, vocabulary: int, free: float, rows: int) -> None:
    assert auto_eval_rows(length, vocabulary, int(free)) == rows
    assert rows == 1 or rows * length * vocabulary * 10 <= free / 4

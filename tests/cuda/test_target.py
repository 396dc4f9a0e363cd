"""``eval`` and ``chat`` on GPUs: where the weights go, and how many rows go through them at
once.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmtune.cli.eval import AUTO_EVAL_ROWS, auto_eval_rows
from llmtune.config.schema import Precision
from llmtune.run.artifact import place_weights

GIB = 2**30


def write_weights(folder: Path, gib: int, kind: str, size: int) -> None:
    """Two shards, whose data are holes; and a second copy of them, as some folders have it."""
    shards = {"model-1.safetensors": gib * GIB // size - 3, "model-2.safetensors": 3}
    index: dict[str, str] = {}
    for name, numel in {**shards, "consolidated.safetensors": gib * GIB // size}.items():
        tensor = f"of {name}"
        header = json.dumps(
            {tensor: {"dtype": kind, "shape": [numel], "data_offsets": [0, numel * size]}}
        ).encode()
        with (folder / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + numel * size)
        if name in shards:
            index[tensor] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize(
    ("gib", "kind", "precision", "expected"),
    [
        (13, "BF16", "bf16", {"": "cuda:0"}),
        (59, "BF16", "bf16", {"": "cuda:0"}),
        (60, "BF16", "bf16", "auto"),
        (141, "BF16", "fp16", "auto"),
        # In memory they have another size than in the files.
        (29, "BF16", "fp32", {"": "cuda:0"}),
        (30, "F16", "fp32", "auto"),
        (118, "F32", "bf16", {"": "cuda:0"}),
        (60, "F32", "fp32", "auto"),
    ],
)
def test_a_model_that_is_larger_than_a_gpu_is_spread(
    gib: int,
    kind: str,
    precision: str,
    expected: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = 79
    write_weights(tmp_path, gib, kind, 4 if kind == "F32" else 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    module = SimpleNamespace(mem_get_info=lambda _: (free * GIB, 80 * GIB))
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    assert place_weights(tmp_path, Precision(precision)) == expected


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
def test_rows_are_as_many_as_their_logits_leave_room_for(
    length: int, vocabulary: int, free: float, rows: int
) -> None:
    assert auto_eval_rows(length, vocabulary, int(free)) == rows
    assert rows == 1 or rows * length * vocabulary * 10 <= free / 4

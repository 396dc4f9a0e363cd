"""The loss curve does not depend on ZeRO stage, ranks, accumulation, or what is kept of
activations.

That it does not depend on having been interrupted either:
``tests/checkpoint/test_resume_matrix.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import largest_difference, matrix, product, train_engines

BASE = [
    "model=tiny",
    "data.train=stdlib_docs@200",
    "data.max_seq_length=256",
    "data.overlong=truncate",
]
FAST = [*BASE, "optim.learning_rate=2e-3"]

TUNERS, PRECISIONS = ("full", "lora"), ("fp32", "bf16")
#: bf16: 1 % of the loss, which stands near 6.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.06}
NORM_TOLERANCE = {"fp32": 1e-4, "bf16": 0.02}
STEPS = 8


Cell = tuple[str, str, int, int, int]
"""Tuner, precision, ZeRO stage, accumulation, ranks."""


def curves(cells: list[Cell], folder: Path) -> dict[Cell, Any]:
    """What an engine of each cell saw in its first steps."""
    found: dict[Cell, Any] = {}
    for ranks in (1, 2):
        of_ranks = [cell for cell in cells if cell[-1] == ranks]
        tasks = [
            {
                "overrides": [
                    *FAST,
                    f"tuner={tuner}",
                    f"precision={precision}",
                    f"zero={stage}",
                    f"train.gradient_accumulation_steps={accumulation}",
                ],
                "first": 0,
                "last": STEPS,
            }
            for tuner, precision, stage, accumulation, _ in of_ranks
        ]
        if tasks:
            found |= dict(
                zip(of_ranks, train_engines(tasks, ranks, folder, timeout=900), strict=True)
            )
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """The curve of each tuner and precision with no ZeRO, no accumulation and one rank."""
    found = curves(product(TUNERS, PRECISIONS, (0,), (1,), (1,)), tmp_path_factory.mktemp("plain"))
    for result in found.values():
        assert result["losses"][-1] < result["losses"][0] - 0.05, "the model must learn"
    return {cell[:2]: result for cell, result in found.items()}


@pytest.mark.process
@pytest.mark.parametrize(
    "cells", matrix(TUNERS, PRECISIONS, (0, 1, 2, 3), (1, 4), (1, 2), size=6, parts=1)
)
def test_stages_ranks_and_accumulation_give_the_same_curve(
    cells: list[Cell], plain: dict[Any, Any], tmp_path: Path
) -> None:
    for cell, result in curves(cells, tmp_path).items():
        tuner, precision, *_ = cell
        reference = plain[tuner, precision]
        assert largest_difference(result["losses"], reference["losses"]) < TOLERANCE[precision], (
            cell
        )
        norms = zip(result["norms"], reference["norms"], strict=True)
        assert all(abs(a / b - 1) < NORM_TOLERANCE[precision] for a, b in norms), cell


@pytest.mark.process
def test_gradient_checkpointing_changes_memory_and_nothing_else(tmp_path: Path) -> None:
    cells = [("full", 3), ("lora", 0)]
    tasks = [
        {
            "overrides": [
                *FAST,
                "precision=fp32",
                f"tuner={t}",
                f"zero={z}",
                f"train.gradient_checkpointing={on}",
            ],
            "first": 0,
            "last": 3,
        }
        for on in ("true", "1", "false")
        for t, z in cells
    ]
    found = train_engines(tasks, 2, tmp_path)
    without = found[4:]
    for cell, with_it, plain in zip(2 * cells, found[:4], 2 * without, strict=True):
        assert largest_difference(with_it["losses"], plain["losses"]) < 1e-5, cell
        assert with_it["losses"][0] != with_it["losses"][-1]


@pytest.mark.process
def test_fp16_scales_its_loss_and_resumes_with_the_scale(tmp_path: Path) -> None:
    """On a CPU that may have no fp16, so on three stages and a few steps only."""
    base = [*FAST, "precision=fp16", "tuner=full"]
    folders = {stage: str(tmp_path / stage / "checkpoint-3") for stage in ("0", "2", "3")}
    tasks = [{"overrides": [*base, f"zero={s}"], "first": 0, "last": 5} for s in folders]
    saving = [{**t, "save": f, "save_at": 3} for t, f in zip(tasks, folders.values(), strict=True)]
    # One after the other in one process group: what is loaded was saved by the tasks before.
    loading = [{**t, "first": 3, "load": f} for t, f in zip(tasks, folders.values(), strict=True)]
    found = train_engines([*saving, *loading], 1, tmp_path)
    for stage, whole, rest in zip(folders, found[:3], found[3:], strict=True):
        assert whole["losses"][-1] < whole["losses"][0] - 0.01, stage
        assert rest["losses"] == whole["losses"][3:], stage
        state = json.loads((Path(folders[stage]) / "trainer_state.json").read_text())
        assert state["loss_scale"]["cur_scale"] > 1


@pytest.mark.process
@pytest.mark.slow
def test_a_loss_scale_that_grows_changes_no_step(tmp_path: Path) -> None:
    """It is what the loss was multiplied by that the gradients are divided by, also in the step
    behind which it grows.
    """
    base = [*FAST, "precision=fp16", "tuner=full"]
    # Each has an optimizer of DeepSpeed's of its own; that of 1 is that of 2.
    stages = [("0", "none"), ("2", "none"), ("3", "none")]
    # Every value of it is a power of two: as long as fp16 holds the gradients, it changes none of
    # their digits.
    kept, grows = {"cur_scale": 1024.0}, {"cur_scale": 1024.0, "scale_window": 1}
    tasks = [
        {
            "overrides": [*base, f"zero={stage}", f"offload={rung}"],
            "first": 0,
            "last": 5,
            "loss_scale": scale,
        }
        for stage, rung in stages
        for scale in (kept, grows)
    ]
    found = train_engines(tasks, 1, tmp_path)
    for stage, plain, grown in zip(stages, found[::2], found[1::2], strict=True):
        assert all(grown["applied"]), stage
        assert grown["loss_scale"] >= 4 * plain["loss_scale"] == 4 * 1024.0, stage
        assert largest_difference(grown["losses"], plain["losses"]) < 1e-3, stage
        assert grown["norms"] == pytest.approx(plain["norms"], rel=1e-3), stage

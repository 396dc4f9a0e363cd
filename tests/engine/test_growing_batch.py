"""Steps of more and more micro-batches give the same curve in every stage and placement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import largest_difference, matrix, train_engines

BASE = [
    "model=tiny",
    "tuner=full",
    "data.train=stdlib_docs@200",
    "data.max_seq_length=256",
    "data.overlong=truncate",
    "optim.learning_rate=2e-3",
]
#: On one rank 1, 2 and 6 micro-batches, or 2, 4 and 12; on two ranks half as many. A count of
#: micro-batches that went on from step to step would miss the end of most of them.
SCHEDULE = "train.batch_schedule=[[0,4],[2,8],[5,24]]"
STEPS = 8

#: (ZeRO stage, rung)
PLACES = [
    *(("0", "none"), ("1", "none"), ("2", "none"), ("3", "none")),
    *(("1", "optimizer_cpu"), ("2", "optimizer_cpu"), ("3", "optimizer_cpu"), ("3", "cpu")),
    *(("3", "optimizer_nvme"), ("3", "nvme")),
]
PRECISIONS, MICRO, RANKS = ("fp32", "bf16", "fp16"), (2, 4), (1, 2)
#: bf16: 1 % of the loss, which is near 6.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.06, "fp16": 0.01}
NORM_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}

Cell = tuple[tuple[str, str], str, int, int]
"""Place, precision, micro-batch size, ranks."""


def is_possible(place: Any, precision: str = "", micro: int = 2, ranks: int = 1) -> bool:
    """The first size must hold a micro-batch of each rank; nothing is offloaded in fp16."""
    return micro * ranks <= 4 and (precision != "fp16" or place[1] == "none")


def curves(cells: list[Cell], folder: Path) -> dict[Cell, Any]:
    """What an engine of each cell saw in its first steps."""
    found: dict[Cell, Any] = {}
    for ranks in RANKS:
        of_ranks = [cell for cell in cells if cell[-1] == ranks]
        tasks = [
            {
                "overrides": [
                    *BASE,
                    SCHEDULE,
                    f"precision={precision}",
                    f"zero={stage}",
                    f"offload={rung}",
                    f"offload.nvme_path={folder}/nvme",
                    f"train.per_device_train_batch_size={micro}",
                ],
                "first": 0,
                "last": STEPS,
                # Below what overflows, so that no step is skipped.
                "loss_scale": {"cur_scale": 1024.0} if precision == "fp16" else {},
            }
            for (stage, rung), precision, micro, _ in of_ranks
        ]
        if tasks:
            results = train_engines(tasks, ranks, folder, timeout=900)
            found |= dict(zip(of_ranks, results, strict=True))
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The curve of each precision in stage 0 on one rank, which a plain loop computes too.

    See ``tests/train/test_growing_run.py``.
    """
    cells: list[Cell] = [(("0", "none"), precision, 4, 1) for precision in PRECISIONS]
    found = curves(cells, tmp_path_factory.mktemp("plain"))
    for result in found.values():
        assert result["losses"][-1] < result["losses"][0] - 0.05, "the model must learn"
    return {cell[1]: result for cell, result in found.items()}


@pytest.mark.process
@pytest.mark.parametrize(
    "cells",
    matrix(PLACES, PRECISIONS, MICRO, RANKS, size=5, allowed=is_possible, once=True, parts=1),
)
def test_every_placement_accumulates_as_many_micro_batches_as_the_step_has(
    cells: list[Cell], plain: dict[str, Any], tmp_path: Path
) -> None:
    for cell, result in curves(cells, tmp_path).items():
        reference = plain[cell[1]]
        assert all(result["applied"]), cell
        difference = largest_difference(result["losses"], reference["losses"])
        assert difference < TOLERANCE[cell[1]], (cell, result["losses"])
        norms = zip(result["norms"], reference["norms"], strict=True)
        assert max(abs(a / b - 1) for a, b in norms) < NORM_TOLERANCE[cell[1]], cell

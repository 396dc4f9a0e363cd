"""A gradient that is not finite, on one rank and in one step, leaves no trace in any stage,
precision or placement.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.support import first, train_engines

BASE = [
    "model=tiny",
    "data.train=stdlib_docs@200",
    "data.max_seq_length=256",
    "data.overlong=truncate",
    "train.global_batch_size=4",
]
CELLS = [
    *(("fp32", stage, "none") for stage in "0123"),
    *(("bf16", stage, "none") for stage in "0123"),
    ("fp32", "1", "optimizer_cpu"),
    ("bf16", "2", "optimizer_cpu"),
    ("fp32", "3", "cpu"),
    ("bf16", "3", "nvme"),
]
BAD, LAST = 2, 5


@pytest.mark.process
@pytest.mark.parametrize("cells", first(1, [CELLS[6:], CELLS[:6]]), ids=len)
def test_the_step_changes_nothing(cells: list[tuple[str, str, str]], tmp_path: Path) -> None:
    tasks = [
        {
            "overrides": [
                *BASE,
                "tuner=full",
                f"precision={precision}",
                f"zero={stage}",
                f"offload={rung}",
                *(f"offload.nvme_path={tmp_path}/nvme", "optim.learning_rate=2e-3"),
            ],
            "first": 0,
            "last": LAST,
        }
        for precision, stage, rung in cells
    ]
    pairs = [{**task, kind: BAD} for task in tasks for kind in ("poison", "leave_out")]
    results = train_engines(pairs, 2, tmp_path)
    for cell, found, expected in zip(cells, results[::2], results[1::2], strict=True):
        assert found["applied"] == [step != BAD for step in range(LAST)], cell
        assert math.isfinite(found["losses"][BAD]), "only the gradient is bad"
        assert not math.isfinite(found["norms"][BAD]), cell
        rest = [loss for step, loss in enumerate(found["losses"]) if step != BAD]
        assert rest == expected["losses"], cell

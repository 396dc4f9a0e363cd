"""Two ranks that share the tokens of rows train as one rank does, in half of its memory each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import largest_difference, train_engines

BASE = [
    "model=tiny",
    "data.train=stdlib_docs@200",
    "data.overlong=truncate",
    "optim.learning_rate=2e-3",
    "train.global_batch_size=8",
]
TWO_RANKS = "launch.sequence_parallel_size=2"
#: bf16: 1 % of the loss, which stands near 6.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.06}

#: Tuner, precision, ZeRO stage, packed, rows per micro-batch, tokens of the longest row,
#: recomputed.
CELLS = [
    ("full", "fp32", 0, False, 1, 256, False),
    ("full", "fp32", 3, True, 4, 255, True),
    ("lora", "fp32", 2, False, 8, 256, True),
    ("lora", "bf16", 3, True, 2, 256, False),
]


def task(cell: tuple[Any, ...], *more: str) -> dict[str, Any]:
    """Four steps of a cell."""
    tuner, precision, stage, packed, rows, length, recompute = cell
    return {
        "overrides": [
            *BASE,
            f"tuner={tuner}",
            f"precision={precision}",
            f"zero={stage}",
            f"data.packing={packed}",
            f"data.max_seq_length={length}",
            f"train.per_device_train_batch_size={rows}",
            f"train.gradient_checkpointing={recompute}",
            *more,
        ],
        "first": 0,
        "last": 4,
    }


@pytest.mark.process
def test_two_ranks_that_share_tokens_give_the_curve_of_one(tmp_path: Path) -> None:
    alone = train_engines([task(cell) for cell in CELLS], 1, tmp_path)
    shared = train_engines([task(cell, TWO_RANKS) for cell in CELLS], 2, tmp_path)
    for cell, one, both in zip(CELLS, alone, shared, strict=True):
        tolerance = TOLERANCE[cell[1]]
        assert one["losses"][-1] < one["losses"][0], cell
        assert largest_difference(one["losses"], both["losses"]) < tolerance, cell
        norms = zip(one["norms"], both["norms"], strict=True)
        assert all(abs(a / b - 1) < max(tolerance, 1e-3) for a, b in norms), cell


@pytest.mark.process
@pytest.mark.slow
def test_four_ranks_in_two_groups_give_the_curve_of_one(tmp_path: Path) -> None:
    """Each group has rows of its own, and the tiny model's two key heads are shared by queries."""
    alone = train_engines([task(cell) for cell in CELLS], 1, tmp_path)
    fitting = [cell if cell[4] <= 4 else (*cell[:4], 4, *cell[5:]) for cell in CELLS]
    for count in (2, 4):
        more = f"launch.sequence_parallel_size={count}"
        shared = train_engines([task(cell, more) for cell in fitting], 4, tmp_path, timeout=900)
        for cell, one, both in zip(CELLS, alone, shared, strict=True):
            difference = largest_difference(one["losses"], both["losses"])
            assert difference < TOLERANCE[cell[1]], (cell, count)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_rows_of_16k_tokens_take_half_of_the_activations(tmp_path: Path, packed: bool) -> None:
    module = "tests.engine.long_rows"
    (found,) = train_engines([packed], 2, tmp_path, timeout=900, module=module)
    assert found["tokens"] == 16384
    assert abs(found["shared_loss"] - found["loss"]) < 1e-4
    assert found["gradient_difference"] < 1e-4
    # Attention's result is there on both sides of the exchange.
    assert found["shared_bytes"] < 0.56 * found["bytes"]

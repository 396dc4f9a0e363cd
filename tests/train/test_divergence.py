"""Losses and gradients that are not finite are traced to their rows; spikes are told."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmtune.config.groups.train import OnNan
from llmtune.data.load.loader import StepBatch
from llmtune.engine.distributed import Rank
from llmtune.engine.train_module import StepResult
from llmtune.errors import DivergedError, RollbackError
from llmtune.train.divergence import MAX_ROLLBACKS, DivergenceMonitor

#: Two micro-batches of two rows; the last one only fills up.
STEP = StepBatch(micro_batches=[], loss_weight=4, tokens=4, position={}, rows=[[7, 3], [5, None]])


def watch(
    run: Path, on_nan: OnNan, losses: list[list[float]] | None = None, precision: str = "bf16"
) -> tuple[DivergenceMonitor, list[str]]:
    said: list[str] = []
    rank = Rank(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    module: Any = SimpleNamespace(
        rank=rank, config={precision: {}}, row_losses=lambda _: losses or [[1.0, 1.0], [1.0, 0.0]]
    )
    loader: Any = SimpleNamespace(locations=lambda row: [f"rows.jsonl:{row}"])
    return DivergenceMonitor(module, loader, on_nan, run, said.append), said


BAD = StepResult(math.nan, math.inf, False)


def test_stop_names_the_rows_that_are_to_blame(tmp_path: Path) -> None:
    monitor, _ = watch(tmp_path, OnNan.stop, [[1.0, math.nan], [2.0, math.nan]])
    with pytest.raises(
        DivergedError, match=r"step 9: loss nan, .* the loss is not finite on rows.jsonl:3$"
    ):
        monitor.check(9, STEP, BAD)
    monitor, _ = watch(tmp_path, OnNan.stop)
    with pytest.raises(
        DivergedError, match=r"the rows of the step are rows.jsonl:3, rows.jsonl:5, rows.jsonl:7$"
    ):
        monitor.check(9, STEP, StepResult(1.0, math.inf, False))


def test_skip_says_it_and_fp16_is_left_to_its_loss_scale(tmp_path: Path) -> None:
    monitor, said = watch(tmp_path, OnNan.skip)
    monitor.check(9, STEP, BAD)
    assert "The step is left out" in said[0]
    monitor, said = watch(tmp_path, OnNan.stop, precision="fp16")
    monitor.check(9, STEP, StepResult(2.0, math.inf, False))
    assert said == []
    with pytest.raises(DivergedError):
        monitor.check(9, STEP, BAD)


def test_rollbacks_are_remembered_and_end(tmp_path: Path) -> None:
    for step in range(1, MAX_ROLLBACKS + 1):
        monitor, _ = watch(tmp_path, OnNan.rollback)
        assert monitor.skipped_steps == frozenset(range(1, step))
        with pytest.raises(RollbackError, match="Going back to the newest checkpoint"):
            monitor.check(step, STEP, BAD)
    with pytest.raises(DivergedError, match="the rows are not the cause"):
        watch(tmp_path, OnNan.rollback)[0].check(99, STEP, BAD)


def test_a_spike_is_told_against_the_last_steps(tmp_path: Path) -> None:
    monitor, said = watch(tmp_path, OnNan.stop)
    for step in range(40):
        monitor.check(step, STEP, StepResult(2.0 + 0.01 * (step % 3), 1.0, True))
    assert said == []
    monitor.check(40, STEP, StepResult(4.0, 1.0, True))
    monitor.check(41, STEP, StepResult(2.0, 25.0, True))
    assert [
        "the loss 4.0000 is a spike" in said[0],
        "the gradient norm 25 is a spike" in said[1],
    ] == [True, True]
    assert len(said) == 2

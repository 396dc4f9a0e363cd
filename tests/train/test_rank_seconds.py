"""The rank that all wait for: found from numbers that are measured anyway, and in a real run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.engine.distributed import Rank
from llmtune.train.hooks import rank_seconds
from llmtune.train.hooks.rank_seconds import EVERY_STEPS, WARM_UP_STEPS, RankSeconds, compare
from tests.support import TINY, run_cli


def rank_of(world_size: int) -> Rank:
    return Rank(rank=0, local_rank=0, world_size=world_size, device=torch.device("cpu"))


def test_the_slowest_is_compared_with_the_median_of_the_others() -> None:
    assert compare([1.0, 5.0]) == {
        "slowest_rank": 1,
        "slowest_rank_seconds": 5.0,
        "other_ranks_seconds": 1.0,
    }
    found = compare([1.0, 2.0, 9.0, 3.0])
    assert (found["slowest_rank"], found["other_ranks_seconds"]) == (2, 2.0)


def test_own_seconds_are_those_before_a_rank_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[float] = []

    def gather(value: Any, _: Rank) -> list[Any]:
        sent.append(value)
        return [value, 0.5]

    monkeypatch.setattr(rank_seconds, "gather_objects", gather)
    rank = rank_of(2)
    ranks, totals = RankSeconds(rank), rank.phases.clock.totals
    for step in range(1, WARM_UP_STEPS + 2 * EVERY_STEPS + 1):
        is_first = step <= WARM_UP_STEPS
        for key, seconds in {
            "data": 0.25,
            "forward": 1.0,
            "gather in forward": 0.5,
            "backward": 7.0,
            "gather": 3.0,
        }.items():
            totals[key] = totals.get(key, 0.0) + seconds * (100 if is_first else 1)
        ranks.after_step()
        if step < WARM_UP_STEPS + EVERY_STEPS:
            assert ranks.take() == {}
    assert sent == pytest.approx([0.75, 0.75])
    assert ranks.take() == {
        "slowest_rank": 0,
        "slowest_rank_seconds": pytest.approx(0.75),
        "other_ranks_seconds": 0.5,
    }
    assert ranks.take() == {}


def test_one_rank_is_compared_with_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_seconds, "gather_objects", lambda *_: pytest.fail("asked"))
    ranks = RankSeconds(rank_of(1))
    for _ in range(WARM_UP_STEPS + EVERY_STEPS):
        ranks.after_step()
    assert ranks.take() == {}


#: A plug-in that makes the forward pass of one rank longer.
_SLOW = """
import os, time
if os.environ.get("RANK") == "1":
    from llmtune.engine.train_module import TrainModule
    real = TrainModule._loss
    def slow(self, batch):
        time.sleep(0.15)
        return real(self, batch)
    TrainModule._loss = slow
"""


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("zero", [0, 3])
def test_a_rank_that_sleeps_is_named(zero: int, tmp_path: Path) -> None:
    (tmp_path / "slow_rank.py").write_text(_SLOW)
    done = run_cli(
        *TINY,
        f"zero={zero}",
        "launch.nproc=2",
        "data.train=stdlib_docs@200",
        "data.val_set_size=4",
        "train.global_batch_size=2",
        f"train.max_steps={WARM_UP_STEPS + EVERY_STEPS + 1}",
        *("train.save_strategy=no", "export=none", f"output_dir={tmp_path}/run"),
        env={"PYTHONPATH": str(tmp_path), "LLMTUNE_PLUGINS": "slow_rank"},
        timeout=600,
    )
    assert done.code == 0, done.out + done.err
    assert "hint: rank 1 takes 0." in done.out

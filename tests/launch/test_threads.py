"""How many threads a rank computes with: its share of the cores, wherever these are set aside."""

from __future__ import annotations

import os

import pytest

from llmtune.launch.launchers.environment import set_thread_default


@pytest.mark.parametrize(
    ("machine", "mine", "ranks", "is_rank", "threads"),
    [
        # The supervisor shares what it has, also under taskset.
        (64, 64, 8, False, 8),
        (64, 16, 8, False, 2),
        (2, 2, 4, False, 1),
        # A rank of torchrun has the whole machine before it, and takes its share; one of Slurm has
        # cores of its own.
        (64, 64, 8, True, 8),
        (64, 8, 8, True, 8),
        (64, 4, 8, True, 4),
        (2, 2, 4, True, 1),
    ],
)
def test_cores_are_shared_once(
    machine: int,
    mine: int,
    ranks: int,
    is_rank: bool,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: machine)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(mine)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    if is_rank:
        monkeypatch.setenv("RANK", "0")
    set_thread_default(ranks)
    assert os.environ["OMP_NUM_THREADS"] == str(threads)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    set_thread_default(ranks)
    assert os.environ["OMP_NUM_THREADS"] == "3", "what the user set wins"

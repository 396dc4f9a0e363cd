"""What ranks will be started with is guessed before torch is there, and they are started anew where
the guess was wrong.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from llmtune.config.compose import compose_config
from llmtune.plan.devices.gpus import count_gpus
from llmtune.run import ranks_ahead
from llmtune.run.ranks_ahead import RanksAhead, Surroundings


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine with as many GPUs as the list says."""
    gpus = [8]
    module: Any = ModuleType("pynvml")
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetCount = lambda: gpus[0]
    monkeypatch.setitem(sys.modules, "pynvml", module)
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    return gpus


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 8),
        ("", 0),
        ("-1", 0),
        ("3", 1),
        ("0,1,2", 3),
        (" 0, 1", 2),
        ("0,9", 1),
        ("0,9,1", 1),
        ("GPU-4bd0,GPU-2f11", 2),
        ("MIG-77aa", 1),
        ("0,-1,2", 1),
        ("none", 0),
    ],
)
def test_gpus_are_counted_as_cuda_counts_them(
    visible: str | None, count: int, nvml: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == count


@pytest.mark.parametrize(
    ("gpus", "overrides", "guessed"),
    [
        (8, ["DS_ACCELERATOR=cpu"], None),
        (8, ["DS_ACCELERATOR=cuda"], ("cuda", 8)),
        (0, ["DS_ACCELERATOR=cuda"], None),
        (8, ["DS_ACCELERATOR=cpu", "hardware.accelerator=cuda"], ("cuda", 8)),
        (8, [], ("cuda", 8)),
        (8, ["launch.nproc=2"], ("cuda", 2)),
        (8, ["hardware.gpus_per_node=4"], ("cuda", 4)),
        (8, ["launch.nproc=9"], None),
        (8, ["hardware.accelerator=cpu"], None),
        (8, ["hardware.nodes=2"], None),
        (8, ["offload.nvme_path=/swap"], None),
        (0, [], None),
        (0, ["launch.nproc=2"], None),
        (0, ["hardware.accelerator=cuda"], None),
    ],
)
def test_what_ranks_are_started_with_is_guessed(
    gpus: int,
    overrides: list[str],
    guessed: tuple[str, int] | None,
    nvml: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvml[0] = gpus
    if overrides and overrides[0].startswith("DS_ACCELERATOR="):
        monkeypatch.setenv("DS_ACCELERATOR", overrides[0].partition("=")[2])
        overrides = overrides[1:]
    found = Surroundings.guess(compose_config(["model=tiny", *overrides]).config)
    assert found == (Surroundings(*guessed, uses_nvme=False) if guessed else None)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Groups of ranks that were started, which are no processes here."""
    started: list[Any] = []

    class Group:
        def __init__(self, command: list[str], world_size: int, ahead: bool):
            self.world_size, self.waits, self.is_closed = world_size, ahead, False
            started.append(self)

        def close(self) -> None:
            self.is_closed = True

    monkeypatch.setattr(ranks_ahead, "RankGroup", Group)
    return started


CPU, TWO, NVME = (Surroundings("cpu", *more) for more in ((1, False), (2, False), (1, True)))


@pytest.mark.parametrize(
    ("guess", "plan", "started"), [(CPU, CPU, 1), (CPU, TWO, 2), (CPU, NVME, 2), (None, CPU, 1)]
)
def test_a_wrong_guess_is_started_anew(
    guess: Surroundings | None, plan: Surroundings, started: int, groups: list[Any]
) -> None:
    with RanksAhead("lora") as ahead:
        ahead.start(guess)
        ahead.start(plan)
        taken = ahead.take()
        assert taken is groups[-1]
        assert taken.world_size == plan.world_size
        taken.waits = False
    assert [group.is_closed for group in groups] == [True] * (started - 1) + [False]


@pytest.mark.parametrize("fails", [False, True])
def test_none_is_left_that_nobody_took(fails: bool, groups: list[Any]) -> None:
    def prepare() -> None:
        with RanksAhead("lora") as ahead:
            ahead.start(TWO)
            if fails:
                raise ValueError("refused")

    if fails:
        with pytest.raises(ValueError, match="refused"):
            prepare()
    else:
        prepare()
    assert [group.is_closed for group in groups] == [True]

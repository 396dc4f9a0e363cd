"""What a rank notes of its GPU, whichever thread asks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch

from llmtune.engine import distributed


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process group of rank 3 of 4 with GPU 3, as CUDA answers in a thread that has chosen no
    GPU: by number, or for GPU 0.
    """
    accelerator = SimpleNamespace(
        device_name=lambda index=None: "cuda" if index is None else f"cuda:{index}",
        communication_backend_name=lambda: "nccl",
        set_device=lambda index: None,
        max_memory_allocated=lambda index=0: {3: 70}.get(index, 0),
        total_memory=lambda index=0: {3: 100}.get(index, 80),
        Event=lambda enable_timing: SimpleNamespace(record=lambda: None),
    )
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: accelerator)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: None)
    for name, answer in {"new_group": None, "get_rank": 3, "get_world_size": 4}.items():
        monkeypatch.setattr(torch.distributed, name, lambda *_, answer=answer, **__: answer)
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    return accelerator


@pytest.mark.parametrize(("share", "limit"), [(1.0, 100), (0.75, 75)])
def test_the_memory_of_a_rank_is_that_of_its_own_gpu(
    share: float, limit: int, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.cuda,
        "get_per_process_memory_fraction",
        lambda index: {3: share}.get(index, 0.5),
        raising=False,
    )
    rank = distributed.init_ranks()
    assert rank.device == torch.device("cuda:3")
    assert rank.phases.device_peak() == (70, limit)

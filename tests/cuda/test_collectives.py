"""No collective of a correction gets a tensor of the host, which NCCL does not take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from llmtune.engine import distributed
from llmtune.engine.deepspeed_fixes import keep_norm_precision
from llmtune.engine.distributed import Rank


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Devices and groups of the tensors that come to a collective, with ``meta`` as the
    accelerator.
    """
    seen: list[tuple[str, Any]] = []

    def note(tensor: torch.Tensor, *_: Any, group: Any = None, **__: Any) -> None:
        seen.append((tensor.device.type, group))

    monkeypatch.setattr(get_accelerator(), "current_device_name", lambda: "meta")
    for name in ("all_reduce", "broadcast", "all_gather_into_tensor"):
        monkeypatch.setattr(torch.distributed, name, note)
    return seen


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("norms_on", ["cpu", "meta"])
def test_the_norm_of_an_offloaded_optimizer_is_reduced_on_the_accelerator(
    stage: int, norms_on: str, reached: list[tuple[str, Any]]
) -> None:
    """Wherever the norms were noted, and although the optimizer's own device is the host."""
    norms = {number: torch.tensor(2.0, device=norms_on) for number in range(3)}
    optimizer = SimpleNamespace(
        device="cpu",
        dp_process_group="ranks",
        norm_for_param_grads=norms,
        get_param_id=lambda number: number,
    )
    assert keep_norm_precision(optimizer, stage)
    # A meta tensor has no number that could come back to the host.
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        optimizer.complete_grad_norm_calculation_for_cpu_offload(range(3))
    assert reached == [("meta", "ranks")]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_norm_of_slices_is_reduced_where_they_are(
    stage: int, count: int, reached: list[tuple[str, Any]]
) -> None:
    optimizer = SimpleNamespace(device="meta", dp_process_group="ranks")
    assert keep_norm_precision(optimizer, stage)
    norm = optimizer.get_grad_norm_direct(
        [torch.ones(4, device="meta", dtype=torch.bfloat16)] * count, None
    )
    assert (norm.device.type, norm.dtype) == ("meta", torch.float64)
    assert reached == [("meta", "ranks")]


def test_sums_are_made_on_the_device_and_decisions_on_the_host(
    reached: list[tuple[str, Any]],
) -> None:
    rank = Rank(rank=0, local_rank=0, world_size=2, device=torch.device("meta"), control="gloo")
    with pytest.raises(RuntimeError, match="meta"):
        distributed.all_reduce_sum([1.0], rank)
    distributed.all_reduce_any([True, False], rank)
    assert reached == [("meta", None), ("cpu", "gloo")]

"""The process group of the ranks, and the few collectives that the rest of the program needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from llmtune.engine.phases import PhaseLog


@dataclass(frozen=True, slots=True)
class Rank:
    """This process among the others."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    phases: PhaseLog = field(default_factory=PhaseLog)
    ranks_on_node: int = 1
    control: Any = None
    """Process group on the host for small decisions, where the default one is on GPUs: no step waits for it."""

    @property
    def is_first(self) -> bool:
        """Rank 0 writes, prints and tracks."""
        return self.rank == 0


def import_deepspeed() -> None:
    """Ahead of its use: it takes a while."""
    import deepspeed  # noqa: F401


def init_ranks(timeout_minutes: float = 60, phases: PhaseLog | None = None) -> Rank:
    """Join the process group that the environment describes (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` ...)."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    phases = phases or PhaseLog()
    # Asked of DeepSpeed, which puts its own tensors there.
    on_host = accelerator.device_name() == "cpu"
    device = torch.device("cpu") if on_host else torch.device(accelerator.device_name(local_rank))
    if not on_host:
        accelerator.set_device(local_rank)
        phases.device_peak = lambda: _device_peak(accelerator, local_rank)
    deepspeed.init_distributed(
        dist_backend="gloo" if on_host else accelerator.communication_backend_name(),
        timeout=timedelta(minutes=timeout_minutes),
        verbose=False,
    )
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or dist.get_world_size())
    control = None if on_host else dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
    return Rank(dist.get_rank(), local_rank, dist.get_world_size(), device, phases, on_node, control)


def _device_peak(accelerator: Any, local_rank: int) -> tuple[int, int]:
    """Bytes that were allocated on this rank's GPU at most, and those that may be.

    By the GPU's number: the threads that save ask too, and the current GPU of a new thread is the first.
    """
    module = torch.get_device_module(accelerator.device_name())
    # Of ``launch.memory_limit``; torch 2.7 does not tell.
    share = getattr(module, "get_per_process_memory_fraction", lambda _: 1.0)(local_rank)
    return accelerator.max_memory_allocated(local_rank), int(share * accelerator.total_memory(local_rank))


def meet_ranks(rank: Rank) -> None:
    """Wait for the others, so that none ends while another still talks to it."""
    if rank.world_size > 1:
        # NCCL's has a GPU spin for as long as the slowest copies its checkpoint elsewhere.
        dist.barrier(group=rank.control)


def sum_over_ranks(values: list[float], rank: Rank) -> list[float]:
    """The element-wise sum over all ranks, in fp64: token counts outgrow fp32."""
    if rank.world_size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=rank.device)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor]


def any_rank(flags: Sequence[bool], rank: Rank) -> list[bool]:
    """Which of the flags are set on any rank. Waits for no GPU."""
    if rank.world_size == 1:
        return list(flags)
    tensor = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=rank.control)
    return [bool(flag) for flag in tensor]


def gather_objects(value: Any, rank: Rank) -> list[Any]:
    """The values of all ranks, in order, on every rank."""
    if rank.world_size == 1:
        return [value]
    values: list[Any] = [None] * rank.world_size
    dist.all_gather_object(values, value, group=rank.control)
    return values


def broadcast_object(value: Any, rank: Rank) -> Any:
    """Rank 0's value on every rank."""
    values = [value if rank.is_first else None]
    if rank.world_size > 1:
        dist.broadcast_object_list(values, src=0, group=rank.control)
    return values[0]

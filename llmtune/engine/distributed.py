"""Join the ranks' process group; the collectives that the rest of the program uses."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llmtune.engine.phases.heartbeat import PhaseLog
from llmtune.engine.phases.phase_clock import PhaseClock, StreamTimer


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """This process and its place in the process group."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    phases: PhaseLog = field(default_factory=PhaseLog)
    ranks_on_node: int = 1
    control: Any = None
    """Process group on the host for small decisions, where the default one is on GPUs."""
    timeout: timedelta = timedelta(minutes=60)
    """The time that a collective waits for the other ranks."""

    @property
    def is_first(self) -> bool:
        """Tell whether this is rank 0, which writes, prints and tracks."""
        return self.rank == 0


def import_deepspeed() -> None:
    """Import DeepSpeed ahead of its use, because that takes a while."""
    import deepspeed  # noqa: F401


def init_ranks(
    timeout_minutes: float = 60, phases: PhaseLog | None = None, meeting: Path | None = None
) -> Rank:
    """Join the process group that the environment describes (``RANK``, ``WORLD_SIZE`` ...).

    Args:
        meeting: A file in a private folder of this user, through which ranks of one machine find
            each other. Without it they use ``MASTER_ADDR``, where torch's server listens on all
            interfaces and trusts every client.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # The device of this rank.
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    phases = phases or PhaseLog()
    # DeepSpeed decides, because it puts its own tensors there.
    on_host = accelerator.device_name() == "cpu"
    device = torch.device("cpu") if on_host else torch.device(accelerator.device_name(local_rank))
    if not on_host:
        accelerator.set_device(local_rank)
        phases.device_peak = lambda: _device_peak(accelerator, local_rank)
        phases.clock = PhaseClock(StreamTimer(accelerator))

    # The process group.
    timeout, init_method = timedelta(minutes=timeout_minutes), None
    if meeting is not None:
        # A descriptor, which stays open, replaces the path of the folder: torch ends a path at # or
        # ?.
        folder = os.open(meeting.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        init_method = f"file:///proc/self/fd/{folder}/{meeting.name}"
    deepspeed.init_distributed(
        dist_backend="gloo" if on_host else accelerator.communication_backend_name(),
        timeout=timeout,
        verbose=False,
        init_method=init_method,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )

    # The number of ranks on this machine: torchrun, or DeepSpeed's launcher, says it.
    on_node = int(
        os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or dist.get_world_size()
    )

    # With NCCL, small decisions go through a group on the host.
    control = None
    if not on_host:
        control = dist.new_group(backend="gloo", timeout=timeout)
    return Rank(
        rank=dist.get_rank(),
        local_rank=local_rank,
        world_size=dist.get_world_size(),
        device=device,
        phases=phases,
        ranks_on_node=on_node,
        control=control,
        timeout=timeout,
    )


def _device_peak(accelerator: Any, local_rank: int) -> tuple[int, int]:
    """Peak bytes allocated on this rank's GPU, and their limit.

    The GPU is named by its index, because the threads that save ask too, and the current GPU of a
    new thread is the first one.
    """
    module = torch.get_device_module(accelerator.device_name())
    # The share follows ``launch.memory_limit``; torch 2.7 does not tell it.
    share = getattr(module, "get_per_process_memory_fraction", lambda _: 1.0)(local_rank)
    return accelerator.max_memory_allocated(local_rank), int(
        share * accelerator.total_memory(local_rank)
    )


def barrier(rank: Rank) -> None:
    """Wait for all ranks, so that none ends while another still talks to it."""
    if rank.world_size > 1:
        # NCCL's barrier would keep a GPU busy until the slowest rank has copied its checkpoint.
        dist.barrier(group=rank.control)


def all_reduce_sum(values: list[float], rank: Rank) -> list[float]:
    """Sum values element by element over all ranks, in fp64, because token counts outgrow fp32."""
    if rank.world_size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=rank.device)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor]


def all_reduce_any(flags: Sequence[bool], rank: Rank) -> list[bool]:
    """Return which flags are set on any rank, without waiting for a GPU."""
    if rank.world_size == 1:
        return list(flags)
    tensor = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=rank.control)
    return [bool(flag) for flag in tensor]


def gather_rows(tensor: torch.Tensor, rank: Rank) -> torch.Tensor:
    """Join the rows of all ranks' tensors, in the order of the ranks, on every rank.

    Args:
        tensor: On the host. Ranks may have different numbers of rows. Shape (rows, ...).
    """
    if rank.world_size == 1:
        return tensor
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(rank.world_size)]
    dist.all_gather(counts, torch.tensor([len(tensor)]), group=rank.control)
    longest = max(int(count) for count in counts)
    padded = tensor.new_zeros((longest, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    pieces = [torch.empty_like(padded) for _ in range(rank.world_size)]
    dist.all_gather(pieces, padded, group=rank.control)
    return torch.cat([piece[: int(count)] for piece, count in zip(pieces, counts, strict=True)])


def gather_objects(value: Any, rank: Rank) -> list[Any]:
    """Gather the values of all ranks, in order, on every rank.

    They are sent as JSON, because torch would unpickle what another rank sends.

    Args:
        value: Plain values; tuples arrive as lists.
    """
    if rank.world_size == 1:
        return [_from_bytes(_to_bytes(value))]
    own = _to_bytes(value)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(rank.world_size)]
    dist.all_gather(sizes, torch.tensor([own.numel()]), group=rank.control)
    longest = max(int(size) for size in sizes)
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(rank.world_size)]
    dist.all_gather(
        texts, torch.nn.functional.pad(own, (0, longest - own.numel())), group=rank.control
    )
    return [_from_bytes(text[: int(size)]) for text, size in zip(texts, sizes, strict=True)]


def broadcast_object(value: Any, rank: Rank) -> Any:
    """Send rank 0's value to every rank, as JSON (see :func:`gather_objects`)."""
    text = _to_bytes(value if rank.is_first else None)
    if rank.world_size > 1:
        size = torch.tensor([text.numel()])
        dist.broadcast(size, src=0, group=rank.control)
        text = text if rank.is_first else torch.zeros(int(size), dtype=torch.uint8)
        dist.broadcast(text, src=0, group=rank.control)
    return _from_bytes(text)


def broadcast_tensor(tensor: torch.Tensor, source: int, rank: Rank) -> None:
    """Send a rank's tensor to every rank, into memory of the same shape on the ranks' devices."""
    if rank.world_size > 1:
        dist.broadcast(tensor, src=source)


def _to_bytes(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(text: torch.Tensor) -> Any:
    return json.loads(text.numpy().tobytes())

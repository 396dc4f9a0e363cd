"""Cores near a rank's GPU: an optimizer on the host is bound by memory, which is slower from the
other socket.
"""

from __future__ import annotations

import os

from llmtune.plan.devices.gpus import near_cores


def bind_to_gpu(local_rank: int, ranks_on_node: int) -> set[int] | None:
    """Keep this process and the threads that it starts to the cores of its GPU's NUMA node; None
    where that is not done.

    Not where somebody has bound it already (a launcher, Slurm, a container), nor where NVML does
    not say. Threads are no more than there are cores then: those of the machine were shared out
    among its ranks before, and all of these may be near one socket. OpenMP's threads wait for each
    other in a loop, and take many times as long where they have to take turns.
    """
    cores = os.sched_getaffinity(0)
    if len(cores) < (os.cpu_count() or 1):
        return None
    near = near_cores(local_rank) & cores
    if not near or near == cores:
        return None
    os.sched_setaffinity(0, near)
    import torch

    torch.set_num_threads(
        max(1, min(torch.get_num_threads(), len(near) // _ranks_near(near, ranks_on_node)))
    )
    return near


def _ranks_near(cores: set[int], ranks_on_node: int) -> int:
    """Ranks whose GPUs are near these cores; 1 where this process sees its own GPU only, and does
    not know the others'.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None and len(listed.split(",")) < ranks_on_node:
        return 1
    return max(1, sum(1 for rank in range(ranks_on_node) if near_cores(rank) & cores))

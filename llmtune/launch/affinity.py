"""Cores near a rank's GPU: an optimizer on the host is bound by memory, which is slower from the other socket."""

from __future__ import annotations

import os

from llmtune.plan.gpus import near_cores


def bind_to_gpu(local_rank: int) -> set[int] | None:
    """Keep this process and the threads that it starts to the cores of its GPU's NUMA node; None where that is not done.

    Not where somebody has bound it already (a launcher, Slurm, a container), nor where NVML does not say.
    """
    cores = os.sched_getaffinity(0)
    if len(cores) < (os.cpu_count() or 1):
        return None
    near = near_cores(local_rank) & cores
    if not near or near == cores:
        return None
    os.sched_setaffinity(0, near)
    return near

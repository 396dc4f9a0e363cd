"""Bind a rank to the cores near its GPU: memory of the other socket is slower."""

import os

from llmtune.plan.devices.gpus import near_cores


def bind_to_gpu(local_rank: int, ranks_on_node: int) -> set[int] | None:
    """Bind this process and its later threads to the cores of its GPU's NUMA node.

    A process that was bound before (by a launcher, Slurm, a container) is left alone, and so is one
    whose GPU NVML does not place. Threads are limited to the cores of this rank: OpenMP's threads
    spin while they wait for each other, and are many times slower where they share cores.

    Returns:
        The cores; None where nothing was bound.
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
    """Return the ranks whose GPUs are near these cores; 1 where only the own GPU is visible."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None and len(listed.split(",")) < ranks_on_node:
        return 1
    return max(1, sum(1 for rank in range(ranks_on_node) if near_cores(rank) & cores))

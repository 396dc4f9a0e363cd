"""Memory in use and memory that is left."""

from __future__ import annotations

import resource

import psutil
import torch


def used_memory_bytes(device: torch.device) -> int:
    """Peak allocated by torch on a GPU; resident memory of the process on a CPU. As the progress line shows it."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def free_host_memory_bytes(ranks_on_node: int) -> int:
    """What this rank may still take of the host's memory: its share of what is available, or what its limit leaves."""
    share = psutil.virtual_memory().available // ranks_on_node
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if limit == resource.RLIM_INFINITY:
        return share
    return min(share, max(0, limit - psutil.Process().memory_info().data))

"""Memory in use and memory that is left."""

from __future__ import annotations

import resource

import psutil
import torch


def used_memory_bytes(device: torch.device) -> int:
    """Peak allocated by torch on a GPU; resident memory of the process on a CPU.

    As the progress line shows it.
    """
    if device.type != "cpu":
        return int(torch.get_device_module(device).max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def spare_host_memory_bytes(planned_bytes: int, ranks_on_node: int) -> int:
    """What this rank may take of the host's memory beside what training needs; nothing where its
    memory is capped.

    Args:
        planned_bytes: Of this rank at its peak, by the plan.
    """
    if resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY:
        return 0
    to_come = max(0, planned_bytes - int(psutil.Process().memory_info().rss))
    return max(0, psutil.virtual_memory().available // ranks_on_node - to_come)

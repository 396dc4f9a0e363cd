"""Measure the memory in use and the memory that is left."""

from __future__ import annotations

import functools
import os
import resource

import psutil
import torch


def used_memory_bytes(device: torch.device) -> int:
    """Return torch's peak allocation on a GPU, or the process's resident memory on a CPU."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).max_memory_allocated(device))
    return int(_this_process(os.getpid()).memory_info().rss)


@functools.cache
def _this_process(number: int) -> psutil.Process:
    """Find a process by its number once: psutil reads when it was started."""
    return psutil.Process(number)


def spare_host_memory_bytes(planned_bytes: int, ranks_on_node: int) -> int:
    """Return the host memory that this rank may use beyond what training needs.

    It is 0 where the process's memory is capped.

    Args:
        planned_bytes: The planned peak of this rank.
    """
    if resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY:
        return 0
    to_come = max(0, planned_bytes - int(psutil.Process().memory_info().rss))
    return max(0, psutil.virtual_memory().available // ranks_on_node - to_come)

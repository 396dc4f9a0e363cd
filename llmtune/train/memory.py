"""Memory in use, as the progress line shows it."""

from __future__ import annotations

import psutil
import torch


def used_memory_bytes(device: torch.device) -> int:
    """Peak allocated by torch on a GPU; resident memory of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)

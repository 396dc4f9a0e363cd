"""The keys of ``zero`` and ``offload``: what DeepSpeed partitions and moves off the GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


@dataclass(slots=True)
class ZeroConfig:
    """The states that DeepSpeed ZeRO partitions over the ranks."""

    stage: int | str = "auto"
    """0: nothing; 1: optimizer states; 2: gradients too; 3: weights too.

    ``auto`` takes the fastest stage that fits.
    """
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Raw DeepSpeed keys merged over the planned ones, such as ``{aio: {queue_depth: 64}}``.

    Unknown keys are errors.
    """


class OffloadDevice(Enum):
    """The memory in which ZeRO keeps a state."""

    auto = "auto"
    none = "none"
    cpu = "cpu"
    nvme = "nvme"


@dataclass(slots=True)
class OffloadConfig:
    """The states that are kept outside the accelerator's memory.

    With both ``auto``, the ladder of placements is tried: in the plan, and when memory runs out.
    """

    optimizer: OffloadDevice = OffloadDevice.auto
    """Master weights, moments and the optimizer step."""
    param: OffloadDevice = OffloadDevice.auto
    """Weights; needs ZeRO 3."""
    nvme_path: str | None = None
    """Folder on a fast local disk for what is offloaded to NVMe.

    The run makes its own folder in it, and removes it afterwards.
    """

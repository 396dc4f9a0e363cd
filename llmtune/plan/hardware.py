"""What the run may use: named in the config, or probed on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from llmtune.config.schema import Accelerator, HardwareConfig
from llmtune.errors import MissingPrerequisiteError
from llmtune.plan.units import format_bytes, parse_bytes


@dataclass(frozen=True, slots=True)
class Hardware:
    """One node."""

    accelerator: str
    """``cuda`` or ``cpu``."""
    device_count: int
    """Accelerators of the node; 1 for a CPU, whose ranks share one memory."""
    device_memory_bytes: int
    """Memory of one accelerator; of the whole host for a CPU."""
    host_memory_bytes: int
    """Memory of the node, as far as this process may use it."""

    def describe(self) -> str:
        """One phrase for messages."""
        if self.accelerator == "cpu":
            return f"CPU with {format_bytes(self.host_memory_bytes)} of memory"
        return (
            f"{self.device_count} GPU(s) of {format_bytes(self.device_memory_bytes)}, "
            f"host {format_bytes(self.host_memory_bytes)}"
        )


def resolve_hardware(config: HardwareConfig) -> Hardware:
    """Fill what the config leaves open from this machine.

    Raises:
        MissingPrerequisiteError: CUDA was asked for and there is none.
    """
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    accelerator = _accelerator(config.accelerator, found)
    host = config.host_memory_bytes
    host_bytes = parse_bytes(host, "hardware.host_memory_bytes") if host is not None else probe_host_memory_bytes()
    if accelerator == "cpu":
        return Hardware("cpu", 1, host_bytes, host_bytes)
    count = config.gpus_per_node or found
    if count > found:
        raise MissingPrerequisiteError(
            f"hardware.gpus_per_node={count}: this machine has {found} GPU(s); take hardware=probe to use what is there"
        )
    memory = config.gpu_memory_bytes
    device_bytes = (
        parse_bytes(memory, "hardware.gpu_memory_bytes")
        if memory is not None
        else torch.cuda.get_device_properties(0).total_memory
    )
    return Hardware("cuda", count, device_bytes, host_bytes)


def _accelerator(wanted: Accelerator, cuda_devices: int) -> str:
    name = wanted.value
    origin = "hardware.accelerator"
    if name == "auto":
        name = os.environ.get("DS_ACCELERATOR", "cuda" if cuda_devices else "cpu")
        origin = "DS_ACCELERATOR"
    if name not in ("cuda", "cpu"):
        raise MissingPrerequisiteError(f"{origin}={name}: llmtune knows cuda and cpu")
    if name == "cuda" and not cuda_devices:
        raise MissingPrerequisiteError(
            f"{origin}=cuda, but torch sees no CUDA device: install a CUDA build of torch and check nvidia-smi, "
            "or take hardware=probe hardware.accelerator=cpu"
        )
    return name


def probe_host_memory_bytes() -> int:
    """Physical memory, or the cgroup's limit where that is lower (containers)."""
    total = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(path).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def fp16_supported(accelerator: str) -> bool:
    """Whether DeepSpeed takes fp16 there: on GPUs, and on CPUs whose mkldnn has it."""
    import torch

    return accelerator == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())

"""The keys of ``hardware``: the machines that a run is planned for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Accelerator(Enum):
    """Device type of the ranks."""

    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


@dataclass(slots=True, kw_only=True)
class HardwareConfig:
    """The machines that the run is planned for.

    A null is probed, or looked up in a table by the accelerator's name. Sizes are an integer of
    bytes, or a text such as ``80GB``, ``80GiB``, ``2TB``; bandwidths are the same per second.
    """

    accelerator: Accelerator = Accelerator.auto
    """``cuda``, ``cpu``, or ``auto``: DS_ACCELERATOR if it is set, otherwise what is present."""
    gpu_name: str | None = None
    """A name such as ``A100``, the key of the table of speeds."""
    nodes: int = 1
    """Number of machines in the plan."""
    gpus_per_node: int | None = None
    """Accelerators of one machine to use."""
    gpu_memory_bytes: Any = None
    """Memory of one accelerator."""
    host_memory_bytes: Any = None
    """Memory of one machine."""
    nvme_bytes: Any = None
    """Free space of one machine's NVMe drives; probed behind ``offload.nvme_path``."""
    gpu_flops: float | None = None
    """Dense bf16 operations per second of one accelerator, as in its data sheet."""
    compute_efficiency: float | None = None
    """Share of ``gpu_flops`` that training reaches, recomputation included."""
    gpu_link_bandwidth: Any = None
    """Rate between accelerators of a machine, in one direction, as a collective reaches it.

    It is that of NVLink, or of PCIe where there is none.
    """
    pcie_bandwidth: Any = None
    """Rate between host and one accelerator, in one direction, with all accelerators at once."""
    network_bandwidth: Any = None
    """Rate of one machine, in one direction."""
    host_memory_bandwidth: Any = None
    """Rate of one machine's memory; it bounds the optimizer on the CPU."""
    nvme_read_bandwidth: Any = None
    """Rate of one machine's drives together; the default is that of four PCIe 4 drives.

    The preflight of a run prints what it measures.
    """
    nvme_write_bandwidth: Any = None
    """The same for writing."""
    measured: bool = False
    """Plan this machine with the speed of the runs on it, or of matrix products.

    Runs of 10 steps and more are remembered in ``paths.cache_dir``, for each machine and precision.
    Without one, products are measured once, for 6 s. It takes the place of ``gpu_flops`` and
    ``compute_efficiency``.
    """
    gpu_hour_price: float | None = None
    """Price of one accelerator for an hour, in any currency; the plan says what a run costs."""

"""The hardware of a run."""

from __future__ import annotations

from dataclasses import dataclass

from llmtune.units import counted, format_bytes

#: Bytes per second between the ranks of one CPU, through gloo on the loopback (measured on 2
#: cores: 0.7 to 1.3 GB/s).
CPU_LINK_BANDWIDTH = 1e9
CPU_MEMORY_BANDWIDTH = 15e9
#: Eight adapters of 200 Gb/s.
NETWORK_BANDWIDTH = 160e9
#: Four drives of PCIe 4 under DeepNVMe.
NVME_READ_BANDWIDTH = 10e9
NVME_WRITE_BANDWIDTH = 5e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A node's hardware, and the number of such nodes. Bandwidths are in bytes per second."""

    accelerator: str
    """``cuda`` or ``cpu``."""
    device_count: int
    """Accelerators per node; 1 for a CPU, whose ranks share one memory."""
    device_memory_bytes: int
    """Memory of one accelerator; for a CPU, that of the host."""
    host_memory_bytes: int
    """Memory per node that this process may use."""
    nodes: int = 1
    name: str = ""
    nvme_bytes: int = 0
    """Free space of a node's NVMe drives; 0 if no rung may use them."""
    flops: float = 0.0
    efficiency: float = 0.5
    link_bandwidth: float = CPU_LINK_BANDWIDTH
    pcie_bandwidth: float = CPU_MEMORY_BANDWIDTH
    network_bandwidth: float = NETWORK_BANDWIDTH
    host_memory_bandwidth: float = CPU_MEMORY_BANDWIDTH
    nvme_read_bandwidth: float = NVME_READ_BANDWIDTH
    nvme_write_bandwidth: float = NVME_WRITE_BANDWIDTH
    fp32_flops: float = 0.0
    """Operations per second in fp32 without TF32; 0 means half of ``flops``."""
    compute_capability: int = 0
    """NVIDIA's (see :class:`llmtune.plan.devices.gpus.Gpu`); 0 if it is not known."""
    notes: tuple[str, ...] = ()
    """Differences between this machine and the one that was named."""

    def describe(self) -> str:
        """Describe the hardware in a phrase."""
        nvme = f", NVMe {format_bytes(self.nvme_bytes)}" if self.nvme_bytes else ""
        if self.accelerator == "cpu":
            return f"CPU with {format_bytes(self.host_memory_bytes)} of memory{nvme}"
        nodes = f"{self.nodes} x " if self.nodes > 1 else ""
        name = f" {self.name}" if self.name else ""
        return (
            f"{nodes}{counted(self.device_count, 'GPU')}{name} of"
            f" {format_bytes(self.device_memory_bytes)}, host"
            f" {format_bytes(self.host_memory_bytes)}{nvme}"
        )

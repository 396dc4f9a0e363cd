"""The planned peak memory of a rank, by category, and the size of a checkpoint."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBytes:
    """One rank's peak on its accelerator; the fields add up to it."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    adapters: int = 0
    activations: int = 0
    logits: int = 0
    buffers: int = 0
    """Reduction buckets, resident small weights, the layer that is gathered."""
    working_set: int = 0
    step: int = 0
    start: int = 0
    """Decomposition of weights before the first step, with which PiSSA and OLoRA begin."""
    runtime: int = 0

    @property
    def total(self) -> int:
        """Return the sum of all fields."""
        return sum(asdict(self).values())

    @property
    def persistent(self) -> int:
        """Return the bytes that do not depend on the micro-batch."""
        return self.total - self.activations - self.logits - self.working_set


@dataclass(frozen=True, slots=True, kw_only=True)
class HostBytes:
    """One rank's peak in host memory; a CPU rank counts its accelerator's share in DeviceBytes."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    adapters: int = 0
    buffers: int = 0
    """Pinned buffers of the swapper."""
    load: int = 0
    """Bytes that loading needs beyond the other fields.

    Below ZeRO 3 every rank reads the full model, with adapters through the host.
    """
    save: int = 0
    """One tensor on its way to a file."""
    start: int = 0
    """First values of the adapters of PiSSA and OLoRA.

    Each rank has them while adapters begin, and the one that writes the adapter keeps them.
    """
    runtime: int = 0

    @property
    def total(self) -> int:
        """Return the sum of all fields."""
        return sum(asdict(self).values())


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes of one rank, and of a checkpoint of the run."""

    device: DeviceBytes
    host: HostBytes
    nvme: int
    nvme_written_per_step: int
    checkpoint: int
    """Files of one checkpoint, from all ranks; states on NVMe are written into it."""

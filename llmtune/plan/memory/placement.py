"""Where ZeRO keeps what: the rungs of the ladder."""

from __future__ import annotations

from dataclasses import dataclass

from llmtune.config.groups.zero import OffloadConfig, OffloadDevice
from llmtune.config.schema import TunerKind

#: Rung -> (device of optimizer and master weights, device of weights), fastest first; the options
#: of ``conf/offload/``.
RUNGS: dict[str, tuple[str, str]] = {
    "none": ("none", "none"),
    "optimizer_cpu": ("cpu", "none"),
    "cpu": ("cpu", "cpu"),
    "optimizer_nvme": ("nvme", "none"),
    "nvme": ("nvme", "nvme"),
}


@dataclass(frozen=True, slots=True)
class Placement:
    """What ZeRO partitions and where it keeps it."""

    zero_stage: int
    optimizer: str = "none"
    """``none`` (the accelerator), ``cpu`` or ``nvme``: master weights, moments and the optimizer
    step.
    """
    param: str = "none"
    """The same for the weights."""

    @property
    def rung(self) -> str:
        """Its name on the ladder. LoRA's ``nvme`` has the small optimizer on the host."""
        if self.param == "nvme":
            return "nvme"
        return next(
            name for name, devices in RUNGS.items() if devices == (self.optimizer, self.param)
        )

    @property
    def uses_nvme(self) -> bool:
        """Whether anything is swapped to a disk."""
        return "nvme" in (self.optimizer, self.param)

    def describe(self) -> str:
        """One phrase for messages."""
        places = {"none": "accelerator", "cpu": "host", "nvme": "NVMe"}
        return (
            f"{self.rung}: ZeRO {self.zero_stage}, optimizer on {places[self.optimizer]}, weights"
            f" on {places[self.param]}"
        )


def make_placement(stage: int, rung: str, tuner: TunerKind) -> Placement:
    """The placement of a rung; for adapters ``nvme`` means weights on NVMe and the optimizer on the
    host.
    """
    optimizer, param = RUNGS[rung]
    if tuner is not TunerKind.full and param == "nvme":
        optimizer = "cpu"
    return Placement(stage, optimizer, param)


def named_rung(offload: OffloadConfig) -> str | None:
    """The rung that the config names; None for ``auto``.

    Other pairs were refused by the config's rules.
    """
    if offload.optimizer is OffloadDevice.auto:
        return None
    pair = (offload.optimizer.value, offload.param.value)
    return (
        "nvme"
        if pair[1] == "nvme"
        else next(name for name, devices in RUNGS.items() if devices == pair)
    )


def allowed_stages(rung: str) -> tuple[int, ...]:
    """ZeRO stages in which DeepSpeed honors a rung: below 3 it ignores where weights are offloaded
    to.
    """
    return {"none": (0, 1, 2, 3), "optimizer_cpu": (1, 2, 3)}.get(rung, (3,))

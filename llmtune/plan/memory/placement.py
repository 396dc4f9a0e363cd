"""The rungs of the ladder: on which devices ZeRO keeps the states."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadOption:
    """A rung of the ladder: an option of ``conf/offload/``, and DeepSpeed's devices for it."""

    name: str
    optimizer: str
    """Device of master weights, moments and the optimizer step; ``none`` is the accelerator."""
    param: str
    """Device of the weights."""
    stages: tuple[int, ...]
    """ZeRO stages in which DeepSpeed honors it; below 3 it ignores the device of the weights."""
    for_large_optimizers: bool = False
    """Useful only where many parameters are trained."""

    @property
    def uses_nvme(self) -> bool:
        """Tell whether anything is swapped to a disk."""
        return "nvme" in (self.optimizer, self.param)


#: The rungs by name, fastest first.
RUNGS = {
    option.name: option
    for option in (
        OffloadOption(name="none", optimizer="none", param="none", stages=(0, 1, 2, 3)),
        OffloadOption(name="optimizer_cpu", optimizer="cpu", param="none", stages=(1, 2, 3)),
        OffloadOption(name="cpu", optimizer="cpu", param="cpu", stages=(3,)),
        OffloadOption(
            name="optimizer_nvme",
            optimizer="nvme",
            param="none",
            stages=(3,),
            for_large_optimizers=True,
        ),
        OffloadOption(name="nvme", optimizer="nvme", param="nvme", stages=(3,)),
    )
}


@dataclass(frozen=True, slots=True)
class Placement:
    """The ZeRO stage, and the devices of the states."""

    zero_stage: int
    optimizer: str = "none"
    """Device of master weights, moments and step: ``none`` (accelerator), ``cpu`` or ``nvme``."""
    param: str = "none"
    """Device of the weights."""

    @property
    def rung(self) -> str:
        """Return the rung's name: ``nvme`` also with a small optimizer on the host."""
        return find_rung(self.optimizer, self.param)

    @property
    def uses_nvme(self) -> bool:
        """Tell whether anything is swapped to a disk."""
        return "nvme" in (self.optimizer, self.param)

    def describe(self) -> str:
        """Describe the placement in a phrase."""
        devices = {"none": "accelerator", "cpu": "host", "nvme": "NVMe"}
        return (
            f"{self.rung}: ZeRO {self.zero_stage}, optimizer on {devices[self.optimizer]}, weights"
            f" on {devices[self.param]}"
        )


def make_placement(stage: int, rung: str, trains_all: bool) -> Placement:
    """Return the placement of a rung.

    Args:
        trains_all: All weights are trained. If not, the optimizer's states are small, and the rung
            ``nvme`` keeps them on the host.
    """
    option = RUNGS[rung]
    is_small = option.param == "nvme" and not trains_all
    return Placement(stage, "cpu" if is_small else option.optimizer, option.param)


def find_rung(optimizer: str, param: str) -> str:
    """Return the rung of a pair of devices; the config's rules refuse all other pairs."""
    if param == "nvme":
        return "nvme"
    pairs = {(option.optimizer, option.param): name for name, option in RUNGS.items()}
    return pairs[optimizer, param]


def read_placement(config: dict[str, Any]) -> Placement:
    """Read the placement from DeepSpeed's dictionary (:mod:`llmtune.plan.deepspeed_config`)."""
    zero = config["zero_optimization"]
    devices = [
        zero.get(section, {}).get("device", "none")
        for section in ("offload_optimizer", "offload_param")
    ]
    return Placement(int(zero["stage"]), *devices)

"""What the checks run on: the card, its driver, and the versions of what is installed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

from llmtune.errors import MissingPrerequisiteError
from llmtune.plan.devices import gpus
from llmtune.units import format_bytes

PACKAGES = ("llmtune", "torch", "deepspeed", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where it runs."""

    device: str
    """``cuda`` or ``cpu``."""
    cards: int
    """GPUs; with a CPU in their place, two ranks."""
    card: str
    driver: str | None
    versions: dict[str, str | None] = field(default_factory=dict)


def find_machine(use_cpu: bool) -> Machine:
    """This machine.

    Raises:
        MissingPrerequisiteError: It has no GPU, or torch cannot use it.
    """
    if use_cpu:
        return Machine(
            device="cpu",
            cards=2,
            card=f"no GPU: {_cpu_name()}, {os.cpu_count()} cores",
            driver=None,
            versions=_versions(),
        )
    # As planning finds them.
    visible = gpus.visible_gpus()
    if not visible:
        found = gpus.hidden_gpus()
        reason = (
            f"there are {found}, but torch cannot use them: bash scripts/setup.sh"
            if found
            else "this machine has none"
        )
        raise MissingPrerequisiteError(
            f"no GPU: {reason}. --cpu runs the checks with the CPU in its place"
        )
    first = visible[0]
    card = f"{len(visible)} x {first.name}, {format_bytes(first.memory_bytes)}"
    return Machine(
        device="cuda",
        cards=len(visible),
        card=card,
        driver=_driver(),
        versions={**_versions(), "cuda": _cuda_version()},
    )


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _cuda_version() -> str | None:
    import torch

    return str(torch.version.cuda)


def _driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
    except Exception:
        return None
    return version.decode() if isinstance(version, bytes) else str(version)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

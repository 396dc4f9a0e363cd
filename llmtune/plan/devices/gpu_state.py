"""The state of this process's GPUs while they work, as NVML reads it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmtune.plan.devices.gpus import count_gpus, find_handle, start_nvml

#: Bits of ``nvmlClocksEventReasons`` (``nvml.h``). A power cap is how big cards work all day.
_BRAKES = {
    0x40: "heat (hardware)",
    0x20: "heat (software)",
    0x80: "a brake of the power supply",
    0x8: "a hardware slowdown",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuState:
    """One GPU now; None for what its driver does not tell."""

    index: int
    """Among the GPUs of this process."""
    memory_used_bytes: float | None
    memory_total_bytes: float | None
    utilization: float | None
    """Share of the last second in which a kernel ran, 0 to 1."""
    temperature: float | None
    """Degrees Celsius."""
    power: float | None
    """Watts."""
    slowed_by: str | None = None
    """The reason why its clock is lower than it could be, if that costs speed."""


def read_gpus() -> list[GpuState]:
    """Read all GPUs of this process; none without NVML. Takes about a millisecond for each."""
    return [_read_gpu(start_nvml(), index) for index in range(count_gpus())]


def _read_gpu(nvml: Any, index: int) -> GpuState:
    handle = find_handle(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"), index)

    def read(call: Callable[[], float]) -> float | None:
        try:
            return float(call())
        except nvml.NVMLError:
            # Parts of a GPU (MIG) tell neither utilization nor power.
            return None

    return GpuState(
        index=index,
        memory_used_bytes=read(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used),
        memory_total_bytes=read(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total),
        utilization=read(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
        temperature=read(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        power=read(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
        slowed_by=_find_brake(read(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))),
    )


def _find_brake(reasons: float | None) -> str | None:
    """Return the reason for a low clock, of those that a user can do something about."""
    found = [text for bit, text in _BRAKES.items() if int(reasons or 0) & bit]
    return found[0] if found else None

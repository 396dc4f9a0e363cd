"""The state of this process's GPUs while they work, as NVML reads it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmtune.plan.devices.gpus import count_gpus, find_handle, start_nvml


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
    )

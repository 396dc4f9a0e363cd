"""The speed of this machine as it was measured: by matrix products, and by the runs on it.

``hardware=measured`` plans with it in the place of the table of cards. What a run reached is better
than what products alone would allow, so that it counts where there is any.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from llmtune.config.schema import Precision
from llmtune.plan.devices.hardware import Hardware
from llmtune.storage.atomic import write_cache_file
from llmtune.storage.hashing import sha256_bytes
from llmtune.storage.tensors.dtypes import configured_dtype

#: Share of the speed of plain matrix products that a training step reaches: on a CPU as in
#: :mod:`llmtune.plan.devices.probe`, on a GPU that of published runs on A100s (0.57 of the data
#: sheet's peak, of which products reach about 0.85).
STEP_SHARE = {"cpu": 0.35, "cuda": 0.67}
#: Rows, inputs and outputs of the products: micro-batches of small and large models.
PRODUCTS = ((512, 576, 1536), (1024, 2048, 2048), (2048, 4096, 4096))
#: Seconds for each of them.
SECONDS = 2.0
#: Runs that are remembered, the newest ones.
REMEMBERED = 20
#: A run counts for models of up to so many times its parameters, and for as much smaller ones:
#: small models spend their steps on other things than products.
LIKE = 4.0
#: Fewer steps say little.
FEWEST_STEPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """The speed of a run's steps."""

    flops: float
    """Operations per second of one accelerator."""
    parameters: int
    """Parameters of the model that it trained."""
    steps: int
    time: float
    """Seconds since 1970 when it ended."""


def use_measured(
    hardware: Hardware, precision: Precision, parameters: int, cache_dir: Path
) -> Hardware:
    """Plan with the speed of this machine as it was measured, and measure it where it was not.

    Args:
        parameters: Of the model that is planned.
    """
    runs = [
        run
        for run in read_reached(hardware, precision, cache_dir)
        if parameters / LIKE <= run.parameters <= parameters * LIKE
    ]
    if runs:
        flops = statistics.median(run.flops for run in runs)
        last = date.fromtimestamp(runs[-1].time).isoformat()
        note = (
            f"speed: {flops / 1e12:.3g} TFLOP/s in {precision.value}, the median of"
            f" {len(runs)} runs of models of this size on this machine (the last on {last})"
        )
    else:
        products = _remembered_products(hardware, precision, cache_dir)
        share = STEP_SHARE[hardware.accelerator]
        flops = products * share
        note = (
            f"speed: {flops / 1e12:.3g} TFLOP/s in {precision.value}, {share} of the"
            f" {products / 1e12:.3g} TFLOP/s of matrix products on this machine; runs of"
            f" {FEWEST_STEPS} steps and more of a model of this size will tell better"
        )
    return replace(
        hardware,
        flops=flops if precision is not Precision.fp32 else 2 * flops,
        fp32_flops=0.0,
        efficiency=1.0,
        notes=(*hardware.notes, note),
    )


def remember(hardware: Hardware, precision: Precision, reached: Reached, cache_dir: Path) -> None:
    """Remember what a run reached on this machine; a cache that cannot be written is no error."""
    runs = [*read_reached(hardware, precision, cache_dir), reached][-REMEMBERED:]
    _write(cache_dir, hardware, f"runs-{precision.value}", [asdict(run) for run in runs])


def read_reached(hardware: Hardware, precision: Precision, cache_dir: Path) -> list[Reached]:
    """Read what runs reached on this machine, the oldest first."""
    stored = _read(cache_dir, hardware, f"runs-{precision.value}")
    runs = []
    for values in stored if isinstance(stored, list) else []:
        # A file of another version, or a damaged one, is none.
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            run = Reached(**values)
            date.fromtimestamp(run.time)
            if _is_positive(run.flops) and _is_positive(run.parameters):
                runs.append(run)
    return runs


def measure_products(accelerator: str, precision: Precision, seconds: float = SECONDS) -> float:
    """Measure the operations per second of matrix products, the median over their shapes.

    Args:
        seconds: For each shape.
    """
    import torch

    from llmtune.cpu_products import multiply_in_fp32

    if accelerator == "cpu" and precision is not Precision.fp32:
        multiply_in_fp32()
    dtype = configured_dtype(precision.value)
    wait: Callable[[], None] = torch.cuda.synchronize if accelerator == "cuda" else _do_nothing
    rates = []
    for rows, inputs, outputs in PRODUCTS:
        left = torch.ones(rows, inputs, dtype=dtype, device=accelerator)
        right = torch.ones(inputs, outputs, dtype=dtype, device=accelerator)
        left @ right
        wait()
        began, products = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            left @ right
            wait()
            products += 1
        rates.append(2.0 * rows * inputs * outputs * products / (time.perf_counter() - began))
    return statistics.median(rates)


def _do_nothing() -> None:
    """Wait for nothing: a CPU is done when it returns."""


def _remembered_products(hardware: Hardware, precision: Precision, cache_dir: Path) -> float:
    name = f"products-{precision.value}"
    stored = _read(cache_dir, hardware, name)
    if not _is_positive(stored):
        stored = measure_products(hardware.accelerator, precision)
        _write(cache_dir, hardware, name, stored)
    return float(stored)


def _is_positive(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value > 0


def _read(cache_dir: Path, hardware: Hardware, name: str) -> Any:
    try:
        return json.loads(_file(cache_dir, hardware, name).read_text())
    except (OSError, ValueError, RecursionError):
        return None


def _write(cache_dir: Path, hardware: Hardware, name: str, values: Any) -> None:
    try:
        write_cache_file(_file(cache_dir, hardware, name), json.dumps(values))
    except OSError:
        return


def _file(cache_dir: Path, hardware: Hardware, name: str) -> Path:
    machine = repr((hardware.accelerator, hardware.name, _processor(), os.uname().nodename))
    return cache_dir / "speeds" / f"{name}-{sha256_bytes(machine.encode())[:16]}.json"


def _processor() -> tuple[str, int]:
    """Name the processor, and count the cores that this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
    return model, len(os.sched_getaffinity(0))

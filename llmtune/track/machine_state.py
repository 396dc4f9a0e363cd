"""The state of the machine that a run stands on, read whenever Prometheus asks for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from llmtune.plan.devices.gpu_state import read_gpus
from llmtune.storage import layout


class MachineState:
    """A collector of ``prometheus_client``: GPUs, processors, memory, disks, network, checkpoints.

    Nothing is read between two requests, so that it costs training nothing.
    """

    def __init__(self, prefix: str, run: Path):
        """
        Args:
            prefix: The first part of every name.
            run: The run folder.
        """
        self._prefix = prefix
        self._run = run

    def describe(self) -> list[Any]:
        """Name nothing in advance, so that registering reads nothing."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield the families of numbers."""
        yield from self._collect_gpus()
        yield from self._collect_host()
        yield from self._collect_run()

    def _collect_gpus(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        names = {
            "memory_used_bytes": "Used memory",
            "memory_total_bytes": "Memory",
            "utilization": "Share of the last second in which a kernel ran",
            "temperature": "Degrees Celsius",
            "power": "Watts",
        }
        gpus = read_gpus()
        for key, text in names.items():
            family = GaugeMetricFamily(f"{self._prefix}_gpu_{key}", text, labels=["gpu"])
            for gpu in gpus:
                if (value := getattr(gpu, key)) is not None:
                    family.add_metric([str(gpu.index)], value)
            if family.samples:
                yield family

    def _collect_host(self) -> Iterator[Any]:
        memory = psutil.virtual_memory()
        yield self._gauge("host_memory_available_bytes", "Host memory", memory.available)
        yield self._gauge("host_memory_total_bytes", "Host memory", memory.total)
        times = psutil.cpu_times()
        yield self._counter("host_cpu_idle_seconds", "Idle seconds of all cores", times.idle)
        yield self._gauge("host_cores", "Cores", psutil.cpu_count() or 1)
        # Containers may show neither.
        if (disk := psutil.disk_io_counters()) is not None:
            yield self._counter("host_disk_read_bytes", "Read from disks", disk.read_bytes)
            yield self._counter("host_disk_written_bytes", "Written to disks", disk.write_bytes)
        if (network := psutil.net_io_counters()) is not None:
            yield self._counter("host_network_received_bytes", "Received", network.bytes_recv)
            yield self._counter("host_network_sent_bytes", "Sent", network.bytes_sent)

    def _collect_run(self) -> Iterator[Any]:
        if self._run.is_dir():
            free = psutil.disk_usage(str(self._run)).free
            yield self._gauge("run_disk_free_bytes", "Free where the run folder is", free)
        restarts = self._run / layout.RESTARTS
        count = len(restarts.read_bytes().splitlines()) if restarts.is_file() else 0
        yield self._gauge("restarts", "Restarts and fallbacks of this run", count)
        saved = [path.stat().st_mtime for path in self._run.glob(f"*/{layout.COMPLETE}")]
        if saved:
            age = max(0.0, time.time() - max(saved))
            yield self._gauge("checkpoint_age_seconds", "Age of the newest checkpoint", age)

    def _gauge(self, key: str, text: str, value: float) -> Any:
        from prometheus_client.core import GaugeMetricFamily

        return GaugeMetricFamily(f"{self._prefix}_{key}", text, value=value)

    def _counter(self, key: str, text: str, value: float) -> Any:
        from prometheus_client.core import CounterMetricFamily

        return CounterMetricFamily(f"{self._prefix}_{key}", text, value=value)

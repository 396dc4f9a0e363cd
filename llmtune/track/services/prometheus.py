"""Prometheus: an HTTP endpoint with the newest numbers of the run, its process and its machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmtune.config.groups.tracker import TrackerConfig
from llmtune.track.service import SERVICES, Service, TrackedRun
from llmtune.track.tracker import Outcome, Record, numbers_of

if TYPE_CHECKING:
    from prometheus_client import Gauge

#: The first part of every name.
PREFIX = "llmtune"
#: Upper bounds of the histogram of step times, in seconds.
_STEP_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)


class PrometheusTracker:
    """Serves the last value of every number of a record as a gauge, named ``llmtune_...``."""

    def __init__(self, run: TrackedRun):
        """Open the endpoint.

        Raises:
            OSError: The port is taken, or the address is none of this machine's.
        """
        from prometheus_client import (
            CollectorRegistry,
            Counter,
            Histogram,
            ProcessCollector,
            start_http_server,
        )

        from llmtune.track.machine_state import MachineState

        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._registry.register(MachineState(PREFIX, run.folder))
        ProcessCollector(registry=self._registry)
        self._steps = Histogram(
            f"{PREFIX}_step_seconds",
            "Seconds of a step",
            buckets=_STEP_BUCKETS,
            registry=self._registry,
        )
        self._tokens = Counter(f"{PREFIX}_tokens", "Tokens of this start", registry=self._registry)
        labels = {"run": run.name, **_describe(run.plan)}
        about = self._gauge("run", "The run and how it was started", list(labels))
        about.labels(**labels).set(1)
        config = run.config
        self._server, self._thread = start_http_server(
            config.prometheus_port, config.prometheus_host, self._registry
        )
        run.say(f"metrics: http://{config.prometheus_host}:{config.prometheus_port}/metrics")

    def log(self, record: Record) -> None:
        """Take the numbers of a record."""
        self._gauge("step", "The last step").set(record["step"])
        for key, value in numbers_of(record):
            if key == "seconds":
                self._steps.observe(value)
            elif key == "tokens":
                self._tokens.inc(value)
            else:
                self._gauge(key, f"{key} of the last record that has it").set(value)

    def finish(self, _outcome: Outcome) -> None:
        """Close the endpoint; Prometheus keeps what it has read."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _gauge(self, key: str, text: str, labels: list[str] | None = None) -> Gauge:
        from prometheus_client import Gauge

        if key not in self._gauges:
            self._gauges[key] = Gauge(
                f"{PREFIX}_{key}", text, labels or (), registry=self._registry
            )
        return self._gauges[key]


def _describe(plan: dict[str, Any]) -> dict[str, str]:
    """Return what tells runs apart: how the state is placed, and on what."""
    placement, hardware = plan.get("placement", {}), plan.get("hardware", {})
    return {
        "zero_stage": str(placement.get("zero_stage", "")),
        "offload_optimizer": str(placement.get("optimizer", "")),
        "offload_param": str(placement.get("param", "")),
        "hardware": str(hardware.get("name", "")),
        "world_size": str(plan.get("world_size", "")),
    }


def _find_problem(config: TrackerConfig) -> str | None:
    if 0 < config.prometheus_port < 65536:
        return None
    return f"tracker.prometheus_port={config.prometheus_port}: a port is a number from 1 to 65535"


SERVICES.register(
    Service(
        name="prometheus",
        title="Prometheus",
        open=PrometheusTracker,
        package="prometheus_client",
        extra="prometheus",
        own_keys=("prometheus_port", "prometheus_host"),
        find_problem=_find_problem,
    )
)

"""Grafana's dashboard asks for numbers that the exporter has, and Prometheus answers each query."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import yaml

from llmtune.plan.devices.gpu_state import GpuState
from llmtune.track import machine_state, phase_seconds
from llmtune.track.services.prometheus import PREFIX
from llmtune.track.utilization import Utilization
from tests.docker.files import DOCKER
from tests.support import ROOT, TINY, free_port

BOARD = json.loads((DOCKER / "grafana" / "dashboards" / "llmtune.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
QUERIES = [
    (f"{panel['title']}: {target['legendFormat']}", target["expr"])
    for panel in PANELS
    for target in panel["targets"]
]
#: What ``prometheus_client`` adds to the name of a counter and of a histogram.
_ENDS = re.compile(r"_(total|sum|count|bucket)$")
_NAME = re.compile(rf"\b(?:{PREFIX}|process)_\w+")


class Family:
    """A family of ``prometheus_client``, which need not be installed."""

    def __init__(self, name: str, text: str, **more: Any):
        self.name = name
        self.samples: list[Any] = []

    def add_metric(self, labels: list[str], value: float) -> None:
        self.samples.append(value)


def machine_names(run: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names that the collector of the machine's state yields."""
    core: Any = ModuleType("prometheus_client.core")
    core.GaugeMetricFamily = core.CounterMetricFamily = Family
    monkeypatch.setitem(sys.modules, "prometheus_client", ModuleType("prometheus_client"))
    monkeypatch.setitem(sys.modules, "prometheus_client.core", core)
    gpu = GpuState(
        index=0,
        memory_used_bytes=1.0,
        memory_total_bytes=2.0,
        utilization=0.5,
        temperature=60.0,
        power=300.0,
    )
    monkeypatch.setattr(machine_state, "read_gpus", lambda: [gpu])
    counts: Any = type("Counts", (), dict.fromkeys(("read_bytes", "write_bytes"), 1))
    counts.bytes_recv = counts.bytes_sent = 1
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: counts)
    monkeypatch.setattr(psutil, "net_io_counters", lambda: counts)
    (run / "checkpoint-1").mkdir(parents=True)
    (run / "checkpoint-1" / "COMPLETE").touch()
    return {family.name for family in machine_state.MachineState(PREFIX, run).collect()}


def record_names() -> set[str]:
    """The names of a record's numbers, which the exporter takes as they are."""
    shares = Utilization(model_flops=1.0, computed_flops=2.0, peak=3.0).shares(1.0)
    keys = {*phase_seconds.KEYS.values(), *shares}
    for name in ("loop", "line_sums", "hooks/evaluation"):
        tree = ast.parse((ROOT / "llmtune" / "train" / f"{name}.py").read_text())
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        keys |= {text for text in texts if isinstance(text, str) and text.isidentifier()}
    keys |= exporter_names()
    return {f"{PREFIX}_{key}" for key in keys}


def exporter_names() -> set[str]:
    """The names that the exporter gives by itself."""
    source = (ROOT / "llmtune" / "track" / "services" / "prometheus.py").read_text()
    own = set(re.findall(r'_gauge\("(\w+)"', source))
    own |= set(re.findall(r'f"\{PREFIX\}_(\w+)"', source))
    assert own >= {"run", "step", "tokens", "step_seconds"}
    return own


def asked_names() -> set[str]:
    texts = [expr for _, expr in QUERIES]
    texts += [variable["definition"] for variable in BOARD["templating"]["list"]]
    return {name for text in texts for name in _NAME.findall(text)}


def test_each_name_of_the_dashboard_is_one_that_the_exporter_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = machine_names(tmp_path, monkeypatch) | record_names()
    # Those of prometheus_client's own collector of a process.
    written |= {"process_cpu_seconds", "process_resident_memory_bytes"}
    asked = asked_names()
    assert len(asked) > 30
    assert {name for name in asked if not {name, _ENDS.sub("", name)} & written} == set()


def test_every_panel_asks_the_source_that_is_provisioned() -> None:
    provisioned = DOCKER / "grafana" / "provisioning"
    sources = yaml.safe_load((provisioned / "datasources" / "prometheus.yaml").read_text())
    (source,) = sources["datasources"]
    assert {panel["datasource"]["uid"] for panel in PANELS} == {source["uid"]}
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    (provider,) = yaml.safe_load((provisioned / "dashboards" / "llmtune.yaml").read_text())[
        "providers"
    ]
    compose = (DOCKER / "compose.yaml").read_text()
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in compose
    assert f"{provider['options']['path']}/llmtune.json" in compose


def test_no_two_panels_overlap() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        own = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not own & cells, panel["title"]
        cells |= own


#: Queries that a run on one CPU answers with nothing, and why.
WITHOUT_DATA = {
    "llmtune_mfu": "a CPU's peak is only assumed",
    "llmtune_hfu": "a CPU's peak is only assumed",
    "llmtune_gather_seconds": "weights are gathered in ZeRO 3 alone",
    "llmtune_gpu_": "NVML is not there",
}


def ask(port: int, path: str, **parameters: str) -> Any:
    query = urllib.parse.urlencode(parameters)
    url = f"http://127.0.0.1:{port}/api/v1/{path}?{query}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.loads(answer.read())["data"]


def unanswered(port: int) -> Iterator[str]:
    """The queries to which Prometheus has no answer."""
    for name, expr in QUERIES:
        filled = expr.replace("$__rate_interval", "10s").replace("$instance", ".*")
        found = ask(port, "query", query=filled)["result"]
        values = [float(one["value"][1]) for one in found]
        # NaN is what a rate of nothing is.
        if not values or any(value != value for value in values):
            yield f"{name}: {expr}"


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.usefixtures("started_cold")
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_prometheus_answers_every_query_about_a_run(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    port, own = free_port(), free_port()
    settings = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    settings["global"]["scrape_interval"] = "1s"
    settings["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{port}"]
    config = tmp_path / "prometheus.yml"
    config.write_text(json.dumps(settings))
    train = [sys.executable, "-m", "llmtune", "train", *TINY, "data.train=stdlib_docs@50"]
    train += ["data.val_set_size=4", "train.eval_steps=4", "train.save_steps=4", "export=none"]
    train += ["train.max_steps=100000", "launch.nproc=1", f"output_dir={tmp_path / 'run'}"]
    train += ["tracker=prometheus", f"tracker.prometheus_port={port}"]
    server = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'db'}"]
    server += [f"--web.listen-address=127.0.0.1:{own}"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with (
        subprocess.Popen(server, **quiet) as prometheus,  # type: ignore[call-overload]
        subprocess.Popen(train, cwd=ROOT, env=environment, **quiet) as run,  # type: ignore[call-overload]
    ):
        try:
            expected = {
                f"{name}: {expr}"
                for name, expr in QUERIES
                if any(start in expr for start in WITHOUT_DATA)
            }
            deadline = time.monotonic() + 600
            missing = {"not asked yet"}
            while missing != expected and time.monotonic() < deadline and run.poll() is None:
                time.sleep(2)
                try:
                    missing = set(unanswered(own))
                except OSError:
                    continue
            assert missing == expected
            assert ask(own, "label/instance/values") == [f"127.0.0.1:{port}"]
        finally:
            run.terminate()
            prometheus.terminate()
            run.wait(timeout=120)

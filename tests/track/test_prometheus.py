"""Prometheus' endpoint: what its own parser and its own server read there."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from llmtune.config.groups.tracker import TrackerConfig
from llmtune.plan.devices.gpu_state import GpuState
from llmtune.storage import layout
from llmtune.track import machine_state
from llmtune.track.service import find_service_problems, open_services
from llmtune.track.tracker import Outcome, Trackers
from tests.track.records import record, tracked_run

parser: Any = pytest.importorskip("prometheus_client.parser")

PLAN = {
    "placement": {"zero_stage": 3, "optimizer": "cpu", "param": "none"},
    "hardware": {"name": 'an "A100"'},
    "world_size": 8,
}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def track(folder: Path, said: list[str], port: int, **more: Any) -> Trackers:
    config = TrackerConfig(kind="prometheus", prometheus_port=port)
    run = tracked_run(folder, said, config=config, plan=PLAN, **more)
    return Trackers(open_services(run), said.append)


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def scrape(port: int, wanted: str) -> dict[tuple[str, str], float]:
    """The samples by name and label, as soon as ``wanted`` is among them."""
    for _ in range(100):
        try:
            text = fetch(f"http://127.0.0.1:{port}/metrics")
        except OSError:
            text = ""
        if wanted in text:
            break
        time.sleep(0.05)
    families = parser.text_string_to_metric_families(text)
    return {
        (one.name, one.labels.get("gpu", one.labels.get("le", ""))): one.value
        for family in families
        for one in family.samples
    }


def test_the_newest_numbers_are_there_while_the_run_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = [
        GpuState(
            index=index,
            memory_used_bytes=4e10,
            memory_total_bytes=8e10,
            utilization=0.5,
            temperature=60.0,
            power=None if index else 300.0,
        )
        for index in range(2)
    ]
    monkeypatch.setattr(machine_state, "read_gpus", lambda: gpus)
    (tmp_path / layout.RESTARTS).write_text('{"a": 1}\n{"a": 2}\n')
    saved = tmp_path / "checkpoint-2"
    saved.mkdir()
    (saved / layout.COMPLETE).touch()
    said: list[str] = []
    port = free_port()
    trackers = track(tmp_path, said, port)
    trackers.log(record(1, tokens=100, seconds=0.3, grad_norm=float("inf")))
    trackers.log(record(2, tokens=150, seconds=7.0, data_seconds=0.25, note="text"))
    trackers.log({"step": 2, "eval_loss": 1.5})
    found = scrape(port, "llmtune_eval_loss")
    trackers.finish(Outcome.finished)
    assert said == [f"metrics: http://127.0.0.1:{port}/metrics"]
    values = {name: value for (name, label), value in found.items() if not label}
    assert values["llmtune_step"] == 2
    assert values["llmtune_loss"] == 1.5
    assert values["llmtune_eval_loss"] == 1.5
    assert values["llmtune_tokens_per_second"] == 5.0
    assert values["llmtune_tokens_total"] == 250
    assert values["llmtune_data_seconds"] == 0.25
    assert values["llmtune_grad_norm"] == float("inf")
    assert (values["llmtune_step_seconds_count"], values["llmtune_step_seconds_sum"]) == (2, 7.3)
    assert found["llmtune_step_seconds_bucket", "0.5"] == 1
    assert values["llmtune_restarts"] == 2
    assert 0 <= values["llmtune_checkpoint_age_seconds"] < 60
    assert values["process_resident_memory_bytes"] > 10**7
    assert values["llmtune_host_memory_available_bytes"] > 0
    assert found["llmtune_gpu_utilization", "1"] == 0.5
    assert found["llmtune_gpu_power", "0"] == 300
    assert ("llmtune_gpu_power", "1") not in found
    assert "llmtune_note" not in values
    with pytest.raises(OSError, match="refused"):
        fetch(f"http://127.0.0.1:{port}/metrics")


def test_it_says_which_run_it_is_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz0123456789")
    port = free_port()
    trackers = track(tmp_path, [], port, name="of hf_abcdefghijklmnopqrstuvwxyz0123456789")
    trackers.log(record(1))
    scrape(port, "llmtune_loss")
    text = fetch(f"http://127.0.0.1:{port}/metrics")
    trackers.finish(Outcome.failed)
    (line,) = [line for line in text.splitlines() if line.startswith("llmtune_run{")]
    assert 'zero_stage="3"' in line
    assert 'offload_optimizer="cpu"' in line
    assert 'hardware="an \\"A100\\""' in line
    assert "hf_abc" not in line


def test_a_taken_port_costs_the_endpoint_and_nothing_else(tmp_path: Path) -> None:
    said: list[str] = []
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        trackers = track(tmp_path, said, int(other.getsockname()[1]))
        trackers.log(record(1))
        trackers.finish(Outcome.finished)
    (line,) = said
    assert "Prometheus cannot be opened and is left out" in line
    assert "Address already in use" in line


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_number_that_is_no_port_is_refused(port: int) -> None:
    config = TrackerConfig(kind="prometheus", prometheus_port=port)
    assert "a number from 1 to 65535" in next(find_service_problems(config))


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_prometheus_answers_questions_about_the_run(tmp_path: Path) -> None:
    port, own = free_port(), free_port()
    config = tmp_path / "prometheus.yml"
    jobs = [{"job_name": "llmtune", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}]
    config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}))
    trackers = track(tmp_path / "run", [], port)
    trackers.log(record(1, tokens=100))
    scrape(port, "llmtune_loss")
    with subprocess.Popen(
        [
            *("prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'db'}"),
            f"--web.listen-address=127.0.0.1:{own}",
        ],
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            for step in range(2, 12):
                trackers.log(record(step, tokens=100))
                time.sleep(1)

            def ask(query: str) -> float:
                asked = f"http://127.0.0.1:{own}/api/v1/query?query={query}"
                (found,) = json.loads(fetch(asked))["data"]["result"]
                return float(found["value"][1])

            assert ask("llmtune_tokens_per_second") == 5.0
            assert 0 < ask("llmtune_loss") < 1
            assert ask("rate(llmtune_tokens_total[5s])") == pytest.approx(100, rel=0.5)
        finally:
            server.terminate()
            trackers.finish(Outcome.finished)

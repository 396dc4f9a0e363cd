"""A real run that loses its trackers one after the other goes on, and says what was lost."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llmtune.storage import layout
from tests.support import ROOT, TINY


def kill_wandb(run: subprocess.Popen[str], folder: Path) -> int:
    """Kill W&B's service below a run as soon as the run has begun a file; the number of processes.

    The service opens the file when it knows the run.
    """
    until = time.monotonic() + 300
    while not list(folder.glob("wandb/offline-run-*/*.wandb")):
        assert run.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    below = psutil.Process(run.pid).children(recursive=True)
    services = [process for process in below if process.name().startswith("wandb")]
    for service in services:
        service.kill()
    return len(services)


@pytest.mark.slow
@pytest.mark.process
def test_training_goes_on_without_any_of_its_trackers(tmp_path: Path) -> None:
    """W&B's service is killed, Prometheus' port is taken, TensorBoard's folder is none."""
    pytest.importorskip("prometheus_client")
    pytest.importorskip("tensorboard")
    folder = tmp_path / "run"
    job = [
        *(*TINY, "data.train=stdlib_docs@100", "data.val_set_size=4", "train.max_steps=60"),
        *("train.global_batch_size=2", "export=none", "launch.nproc=1", f"output_dir={folder}"),
        *("tracker.kinds=[wandb,tensorboard,prometheus]", "tracker.mode=offline"),
    ]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "llmtune", *job, f"tracker.prometheus_port={port}"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            until = time.monotonic() + 300
            while not (folder / layout.CONFIG).exists() and time.monotonic() < until:
                time.sleep(0.01)
            # Root may write to a read-only folder, but not to a file as to a folder.
            (folder / layout.TENSORBOARD).touch()
            assert kill_wandb(process, folder) > 0
            out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    assert "Prometheus cannot be opened and is left out" in out
    assert "Address already in use" in out
    assert "TensorBoard cannot be opened and is left out" in out
    (lost,) = [line for line in out.splitlines() if line.startswith("W&B ")]
    assert "is left out (" in lost or "did not close in time" in lost
    records = map(json.loads, (folder / layout.METRICS).read_text().splitlines())
    assert sum("loss" in record for record in records) == 60

"""torchrun in a container: names of pods, signals, and the exit codes that a cluster reads."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmtune.errors import ERRORS_BY_CODE, EXIT_STOPPED
from tests.docker.files import DOCKER, load_program
from tests.support import ROOT, TINY, free_port, losses

node = load_program("node")


def test_its_codes_are_those_of_the_contract() -> None:
    assert node.STOPPED == EXIT_STOPPED
    assert set(node.USER_ERRORS) == set(ERRORS_BY_CODE) - {EXIT_STOPPED}


@pytest.mark.parametrize(
    ("code", "asked", "retry", "ends"),
    [
        (0, False, None, 0),
        (0, True, 143, 0),
        (2, True, 143, 2),
        (7, False, None, 7),
        (75, False, None, 75),
        (75, True, 143, 143),
        (1, False, None, 1),
        (1, False, 143, 143),
        (-9, False, None, 137),
        (-15, True, None, 75),
        (143, True, None, 75),
        (143, False, None, 143),
        (138, True, None, 75),
        (137, False, 143, 143),
    ],
)
def test_a_code_becomes_what_the_cluster_acts_on(
    code: int, asked: bool, retry: int | None, ends: int
) -> None:
    assert node.decide_code(code, asked, retry) == ends


def test_it_waits_for_the_name_of_the_first_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def look_up(name: str, port: object) -> list[Any]:
        asked.append(name)
        if len(asked) < 3:
            raise socket.gaierror(-2, "Name or service not known")
        return []

    monkeypatch.setattr(node.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(node.time, "sleep", lambda seconds: None)
    node.wait_for_name(["--nnodes=2", "--master_addr=job-0.job"])
    assert asked == ["job-0.job"] * 3
    asked.clear()
    monkeypatch.setenv("PET_MASTER_ADDR", "job-master-0")
    node.wait_for_name(["--module", "llmtune"])
    assert set(asked) == {"job-master-0"}
    # What never resolves is torchrun's to report.
    node.wait_for_name(["--master_addr=job-0.job"], seconds=0.0)


def start(run: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(DOCKER / "node.py"), "--nnodes=1", "--nproc_per_node=1"]
    command += ["--node_rank=0", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    command += ["--module", "llmtune", "train", *TINY, "data.train=stdlib_docs@50"]
    command += ["data.val_set_size=4", "export=none", "precision=fp32", "train.save_steps=4"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, f"output_dir={run}", *more],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.usefixtures("started_cold")
def test_a_node_that_is_stopped_saves_and_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    wrong = start(run, "optim.learning_rate=-1")
    out = wrong.communicate(timeout=300)[0]
    assert wrong.returncode == 2, out
    assert "optim.learning_rate" in out

    stopped = start(run, "train.max_steps=80")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and stopped.poll() is None:
        if (run / "metrics.jsonl").is_file() and len(losses(run)) > 2:
            break
        time.sleep(0.1)
    stopped.send_signal(signal.SIGTERM)
    out = stopped.communicate(timeout=300)[0]
    assert stopped.returncode == EXIT_STOPPED, out
    done = len(losses(run))
    assert 2 < done < 80

    last = start(run, "train.max_steps=80")
    out = last.communicate(timeout=300)[0]
    assert last.returncode == 0, out
    assert len(losses(run)) == 80

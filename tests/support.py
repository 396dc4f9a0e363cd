"""What several tests need: the command line as a subprocess, and ranks that train many small engines in one go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.launch.environment import free_port, remove_shared_buffers, set_defaults

ROOT = Path(__file__).parent.parent

#: The tiny model on rows that take no time: what nearly every test trains.
TINY = ["model=tiny", "data.max_seq_length=256", "train.sample_answers=false"]


@dataclass(frozen=True)
class Finished:
    """A finished command."""

    code: int
    out: str
    err: str


def run_cli(*arguments: str, cwd: Path = ROOT, env: dict[str, str] | None = None, timeout: float = 300) -> Finished:
    """``python -m llmtune`` as a user starts it."""
    return run([sys.executable, "-m", "llmtune", *arguments], cwd=cwd, env=env, timeout=timeout)


def run(
    command: list[str], cwd: Path = ROOT, env: dict[str, str] | None = None, timeout: float = 300, stdin: str = ""
) -> Finished:
    """A command with captured output."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        input=stdin,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def losses(run_folder: Path) -> list[float]:
    """Training losses of a run folder, by step."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def train_engines(
    tasks: list[dict[str, Any]],
    world_size: int,
    folder: Path,
    timeout: float = 300,
    module: str = "tests.engine.worker",
) -> list[Any]:
    """Run ``module`` on ``world_size`` ranks; rank 0's result of each task.

    A task has ``overrides``, ``first`` and ``last`` step, and may have ``load``, and ``save`` with ``save_at``.
    """
    set_defaults("cpu", world_size)
    result = folder / f"result-{world_size}-{len(list(folder.glob('result-*')))}.json"
    port = free_port()
    command = [sys.executable, "-m", module, json.dumps(tasks), str(result)]
    logs = [result.with_suffix(f".{rank}.log") for rank in range(world_size)]
    ranks = []
    for rank in range(world_size):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        with logs[rank].open("w") as log:
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log))
    try:
        codes = [rank.wait(timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
        remove_shared_buffers(port)
    assert codes == [0] * world_size, "\n".join(log.read_text()[-3000:] for log in logs)
    return list(json.loads(result.read_text()))

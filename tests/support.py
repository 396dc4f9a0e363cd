"""What several tests need: the command line as a subprocess, and ranks that train many small
engines in one go.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from allpairspy import AllPairs

from llmtune.launch.launchers.environment import hold_port, remove_shared_buffers, set_defaults

ROOT = Path(__file__).parent.parent

#: The C library's number of the setting (``malloc.h``).
_M_MMAP_THRESHOLD = -3

#: The tiny model on rows that take no time: what nearly every test trains.
TINY = ["model=tiny", "data.max_seq_length=256", "train.sample_answers=false"]


@dataclass(frozen=True)
class Finished:
    """A finished command."""

    code: int
    out: str
    err: str


def run_cli(
    *arguments: str, cwd: Path = ROOT, env: dict[str, str] | None = None, timeout: float = 300
) -> Finished:
    """``python -m llmtune`` as a user starts it."""
    return run([sys.executable, "-m", "llmtune", *arguments], cwd=cwd, env=env, timeout=timeout)


def run(
    command: list[str],
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    timeout: float = 300,
    stdin: str = "",
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


def pairs(
    *factors: Sequence[Any], allowed: Callable[..., bool] = lambda *_: True
) -> list[tuple[Any, ...]]:
    """Cells in which every value of each factor meets every value of each other one: a covering
    array of strength two.

    Args:
        allowed: Whether values go together; called with whole cells, and with the beginnings of
            cells.
    """
    return [
        tuple(cell)
        for cell in AllPairs(list(map(list, factors)), filter_func=lambda row: allowed(*row))
    ]


def product(
    *factors: Sequence[Any], allowed: Callable[..., bool] = lambda *_: True
) -> list[tuple[Any, ...]]:
    """All cells, for the slow tier."""
    return [cell for cell in itertools.product(*factors) if allowed(*cell)]


def once_each(cells: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Some of these cells, in which every value of each factor occurs: those with the values that
    the cells before have least.
    """
    seen: Counter[Any] = Counter()
    chosen: list[tuple[Any, ...]] = []
    for factor in range(len(cells[0])):
        for value in dict.fromkeys(cell[factor] for cell in cells):
            if seen[factor, value]:
                continue
            best = min(
                (cell for cell in cells if cell[factor] == value),
                key=lambda cell: sum(seen[place] for place in enumerate(cell)),
            )
            chosen.append(best)
            seen.update(enumerate(best))
    return chosen


def matrix(
    *factors: Sequence[Any],
    size: int,
    allowed: Callable[..., bool] = lambda *_: True,
    once: bool = False,
    parts: int | None = None,
) -> list[Any]:
    """For ``parametrize``: all pairs for the ordinary suite, and every other cell for the slow
    tier.

    Cells come in parts of ``size``, which share their process groups; those that are alike from the
    last factor on stand together.

    Args:
        once: Engines that take long: the ordinary suite has each value once, and the pairs are in
            the slow tier with the others.
        parts: As many of the ordinary suite's parts stay in it, from the end, where the last factor
            has its last value; all where None.
    """
    chosen, ordinary = pairs(*factors, allowed=allowed), "pairs"
    if once:
        chosen, ordinary = once_each(chosen), "values"
    others = [cell for cell in product(*factors, allowed=allowed) if cell not in set(chosen)]
    found = []
    for name, cells, marks in (
        (ordinary, chosen, ()),
        ("other cells", others, (pytest.mark.slow,)),
    ):
        alike = sorted(
            cells,
            key=lambda cell: [list(f).index(c) for f, c in zip(factors, cell, strict=True)][::-1],
        )
        shared = [alike[start : start + size] for start in range(0, len(alike), size)]
        found += [
            pytest.param(
                part,
                id=f"{name} {number} of {len(shared)}",
                marks=marks if parts is None or number > len(shared) - parts else pytest.mark.slow,
            )
            for number, part in enumerate(shared, 1)
        ]
    return found


def first(count: int, values: Sequence[Any]) -> list[Any]:
    """For ``parametrize`` with one name: some values for the ordinary suite, and the others for the
    slow tier.
    """
    return [
        *values[:count],
        *(pytest.param(value, marks=pytest.mark.slow) for value in values[count:]),
    ]


def largest_difference(a: Sequence[float], b: Sequence[float]) -> float:
    """Between two curves of one length."""
    assert len(a) == len(b) > 0
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def free_port() -> int:
    """A TCP port that nobody listens on now; another program may take it at any time."""
    with hold_port() as held:
        return int(held.getsockname()[1])


def wait_for_all(ranks: Sequence[subprocess.Popen[Any]], timeout: float) -> list[int | None]:
    """Exit codes when all have ended, or soon after one has failed: the others may wait for it for
    ever.
    """
    deadline = time.monotonic() + timeout
    while None in (codes := [rank.poll() for rank in ranks]):
        if any(codes):
            deadline = min(deadline, time.monotonic() + 5)
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return codes


def train_engines(
    tasks: Sequence[Any],
    world_size: int,
    folder: Path,
    timeout: float = 300,
    module: str = "tests.engine.worker",
) -> list[Any]:
    """Run ``module`` on ``world_size`` ranks; rank 0's result of each task.

    A task has ``overrides``, ``first`` and ``last`` step, and may have ``load``, and ``save`` with
    ``save_at``.
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
        codes = wait_for_all(ranks, timeout)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        remove_shared_buffers(port)
    assert codes == [0] * world_size, "\n".join(log.read_text()[-3000:] for log in logs)
    return list(json.loads(result.read_text()))


def peak_bytes(reset: bool) -> int:
    """The most memory that this process has had in use at a time, since the last reset."""
    if reset:
        # The C library keeps what was freed, and moves what grows, by what earlier tests left in
        # its heap: blocks of more than a megabyte are to be mappings of their own.
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        gc.collect()
        library.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024

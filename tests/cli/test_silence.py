"""On a machine that has other things to do, the console is never silent for long."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

#: Of nothing, between two lines.
MOST_SILENCE = 10.0
_BUSY = "while True: pass"


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that do nothing but compute."""
    others = [subprocess.Popen([sys.executable, "-S", "-E", "-c", _BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def read_moments(command: list[str], timeout: float) -> tuple[int, list[tuple[float, str]]]:
    """Run a command; its exit code, and the moments of its lines in seconds since its start."""
    began = time.monotonic()
    moments = [(0.0, "(start)")]
    environment = {**os.environ, "LLMTUNE_REPORT": "true"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        rest = b""
        while True:
            assert time.monotonic() - began < timeout
            if not select.select([process.stdout], [], [], 1.0)[0]:
                continue
            data = os.read(process.stdout.fileno(), 65536)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            now = time.monotonic() - began
            moments += [(now, line.decode(errors="replace")) for line in lines]
        code = process.wait()
    moments.append((time.monotonic() - began, "(end)"))
    return code, moments


@pytest.mark.process
def test_silences_are_measured() -> None:
    """The gauge itself, on a program that says nothing for a while."""
    program = "import time; print('a', flush=True); time.sleep(0.5); print('b', flush=True)"
    code, moments = read_moments([sys.executable, "-S", "-E", "-c", program], 60)
    assert code == 0
    assert [text for _, text in moments] == ["(start)", "a", "b", "(end)"]
    assert moments[2][0] - moments[1][0] > 0.4


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.usefixtures("started_cold", "smollm2")
def test_the_embedded_job_is_never_silent_beside_two_busy_processes(tmp_path: Path) -> None:
    """The first command of the README, with fewer steps: every phase of it."""
    steps = os.environ.get("LLMTUNE_TEST_SILENCE_STEPS", "12")
    command = [sys.executable, "-m", "llmtune", f"output_dir={tmp_path}/run"]
    with busy(2):
        code, moments = read_moments([*command, f"train.max_steps={steps}"], 3600)
    text = "\n".join(f"{at:7.1f}  {line}" for at, line in moments)
    assert code == 0, text
    silences = [
        (later[0] - earlier[0], earlier[1], later[1])
        for earlier, later in itertools.pairwise(moments)
    ]
    assert max(silences)[0] <= MOST_SILENCE, f"{max(silences)}\n{text}"

"""Ranks of a few lines that stand in for training, under a supervisor that is a process of its own
or this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from llmtune.launch.supervise.attempt import run_ranks
from llmtune.launch.supervise.supervisor import Limits
from tests.support import ROOT

#: What every fake rank has: its number, its folder, its phase log, and what a real rank does first.
PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path
from llmtune.engine.phases.heartbeat import PhaseLog
from llmtune.errors import DataError, LlmtuneError, StoppedError
from llmtune.launch.launchers.environment import FAILURE_DIR
from llmtune.launch.processes.parent_death import die_with_supervisor
from llmtune.storage.rank_files import phase_file
from llmtune.launch.supervise.rank_report import report_failure
from llmtune.launch.supervise.stacks import answer_with_stacks
rank = int(os.environ["RANK"])
failures = Path(os.environ[FAILURE_DIR])
out = Path(os.environ.get("OUT", failures))
die_with_supervisor()
answer_with_stacks(failures, rank)
phases = PhaseLog(phase_file(failures, rank))
def reach(step, phase="forward"):
    phases.step = step
    phases.enter(phase)
def fail(error):
    os._exit(report_failure(error, rank, sys.stdout, False))
def ready():
    (out / f"{rank}.tmp").write_text(str(os.getpid()))
    (out / f"{rank}.tmp").rename(out / f"{rank}.pid")
def meet():
    ready()
    while not all((out / f"{other}.pid").exists() for other in (0, 1)):
        time.sleep(0.01)
"""

_SUPERVISOR = """
import sys
from pathlib import Path
from llmtune.launch.supervise.attempt import run_ranks
from llmtune.launch.supervise.supervisor import Limits
from llmtune.errors import LlmtuneError
try:
    limits = Limits(*map(float, sys.argv[3:]))
    run_ranks(["-c", sys.argv[1]], 2, Path(sys.argv[2]) / "log", lambda text: print(text, flush=True), limits)
except LlmtuneError as error:
    print(error)
    sys.exit(error.exit_code)
"""  # noqa: E501


def script(body: str) -> str:
    """A rank's program."""
    return PRELUDE + textwrap.dedent(body)


def run_fakes(body: str, folder: Path = Path(), limits: Limits | None = None) -> None:
    """Two ranks under this process."""
    run_ranks(["-c", script(body)], 2, folder / "train.log", lambda _: None, limits)


def start_supervisor(
    body: str, folder: Path, limits: Limits | None = None
) -> subprocess.Popen[str]:
    """Two ranks under another process; returns when both are ready."""
    limits = limits or Limits()
    command = [sys.executable, "-c", _SUPERVISOR, script(body), str(folder)]
    command += [str(limits.hang_timeout), str(limits.stop_timeout)]
    supervisor = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OUT": str(folder)}, stdout=subprocess.PIPE, text=True
    )
    assert wait_until(lambda: len(list(folder.glob("*.pid"))) == 2)
    return supervisor


def end_of(supervisor: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what was printed."""
    out, _ = supervisor.communicate(timeout=30)
    return supervisor.returncode, out


def pid_of(folder: Path, name: str) -> int:
    """What a fake noted."""
    return int((folder / f"{name}.pid").read_text())


def alive(folder: Path) -> list[int]:
    """Processes of the fakes that still run."""
    found = []
    for file in folder.glob("*.pid"):
        state = Path(f"/proc/{file.read_text()}/stat")
        if state.is_file() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z":
            found.append(int(file.read_text()))
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True

"""Ranks that fail, hang, save or are killed; fakes of a few lines stand in for training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from llmtune.errors import CheckpointError, DataError, DoesNotFitError, LlmtuneError, StoppedError
from llmtune.launch.lock import hold_lock
from llmtune.launch.rank import to_user_error
from llmtune.launch.supervisor import run_ranks
from tests.support import ROOT


def ranks(body: str, world_size: int = 2) -> None:
    script = "import os, sys, time, signal, json\nrank = int(os.environ['RANK'])\n" + textwrap.dedent(body)
    run_ranks(["-c", script], world_size, Path("train.log"), lambda _: None)


def report(code: int, message: str) -> str:
    return f"""
        from llmtune.launch.rank import report_failure
        from llmtune.errors import DataError
        sys.exit(report_failure({message}, rank, sys.stdout, False))
    """


def test_ranks_know_each_other() -> None:
    ranks("""
        assert os.environ["WORLD_SIZE"] == "2" and os.environ["MASTER_ADDR"] and int(os.environ["MASTER_PORT"])
        assert os.environ["LOCAL_RANK"] == os.environ["RANK"]
    """)


def test_a_failing_rank_ends_the_others_at_once_with_its_message() -> None:
    started = time.monotonic()
    with pytest.raises(DataError, match=r"rows.jsonl:3") as caught:
        ranks(
            "if rank == 0: time.sleep(600)\n"
            "from llmtune.launch.rank import report_failure\n"
            "from llmtune.errors import DataError\n"
            "sys.exit(report_failure(DataError('rows.jsonl:3: bad'), rank, sys.stdout, False))"
        )
    assert caught.value.exit_code == 4
    assert time.monotonic() - started < 30


def test_an_unexpected_error_points_to_the_log() -> None:
    with pytest.raises(LlmtuneError, match="rank 1: ZeroDivisionError: no\nMore in train.log") as caught:
        ranks(
            "if rank == 0: sys.exit(0)\n"
            "from llmtune.launch.rank import report_failure\n"
            "sys.exit(report_failure(ZeroDivisionError('no'), rank, sys.stdout, False))"
        )
    assert caught.value.exit_code == 1


def test_a_killed_rank_is_named() -> None:
    with pytest.raises(LlmtuneError, match="rank 1 ended with signal SIGKILL"):
        ranks("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)")


def test_ranks_that_stopped_and_saved_are_no_failure() -> None:
    with pytest.raises(StoppedError) as caught:
        ranks("sys.exit(75)")
    assert caught.value.exit_code == 75


SUPERVISOR = """
import sys
from pathlib import Path
from llmtune.launch.supervisor import run_ranks
from llmtune.errors import LlmtuneError
try:
    run_ranks(["-c", sys.argv[1]], 2, Path("log"), lambda text: print(text, flush=True))
except LlmtuneError as error:
    sys.exit(error.exit_code)
"""


def start_supervisor(rank_script: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SUPERVISOR, rank_script, str(folder)]
    supervisor = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OUT": str(folder)}, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 30
    while len(list(folder.glob("*.pid"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return supervisor


def alive(folder: Path) -> list[int]:
    found = []
    for file in folder.glob("*.pid"):
        state = Path(f"/proc/{file.read_text()}/stat")
        if state.is_file() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z":
            found.append(int(file.read_text()))
    return found


SAVES_ON_SIGTERM = """
import os, signal, sys, time
def save(*_):
    open(os.environ["OUT"] + "/saved" + os.environ["RANK"], "w").close()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
from llmtune.process import die_with_parent
die_with_parent()
path = os.environ["OUT"] + "/" + os.environ["RANK"]
open(path + ".tmp", "w").write(str(os.getpid())); os.rename(path + ".tmp", path + ".pid")
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_all_ranks_save(number: int, tmp_path: Path) -> None:
    supervisor = start_supervisor(SAVES_ON_SIGTERM, tmp_path)
    supervisor.send_signal(number)
    assert supervisor.wait(30) == 75
    assert {file.name for file in tmp_path.glob("saved*")} == {"saved0", "saved1"}


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    stubborn = SAVES_ON_SIGTERM.replace("signal.SIGTERM, save", "signal.SIGTERM, signal.SIG_IGN")
    supervisor = start_supervisor(stubborn, tmp_path)
    supervisor.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert supervisor.poll() is None
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(30) != 0
    assert not alive(tmp_path)


def test_no_rank_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    supervisor = start_supervisor(SAVES_ON_SIGTERM, tmp_path)
    assert len(alive(tmp_path)) == 2
    supervisor.kill()
    supervisor.wait()
    deadline = time.monotonic() + 10
    while alive(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(tmp_path)


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    with hold_lock(tmp_path / ".lock"), pytest.raises(CheckpointError, match=rf"process {os.getpid()}"):  # noqa: SIM117
        with hold_lock(tmp_path / ".lock"):
            pass
    with hold_lock(tmp_path / ".lock"):
        pass


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
    ],
)
def test_memory_that_ran_out_comes_with_advice(error: Exception) -> None:
    known = to_user_error(error)
    assert isinstance(known, DoesNotFitError)
    assert "train.gradient_checkpointing=true" in str(known)
    assert to_user_error(ValueError("x")) is None

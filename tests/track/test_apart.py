"""A tracker's process: order, errors, signals, and its end when the run is gone."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from queue import Queue

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.track.apart.process import Message, TrackerProcess, TrackerProcessError, _groups
from tests.support import ROOT

LOG = {"kind": "log", "record": {"step": 7, "loss": Path("a path")}}
MODULE = "tests.track.apart_notes"


@given(st.lists(st.sampled_from(["log", "summarize", "finish"])))
def test_messages_stay_in_order_and_only_records_come_together(kinds: list[str]) -> None:
    messages = [{"kind": kind, "number": number} for number, kind in enumerate(kinds)]
    waiting: Queue[Message | None] = Queue()
    for message in [*messages, None]:
        waiting.put(message)
    groups = list(_groups(waiting))
    assert [message for group in groups for message in group] == messages
    assert all(len(group) == 1 or {m["kind"] for m in group} == {"log"} for group in groups)
    # All of them were there, so that no two neighbors are records.
    firsts = [group[0]["kind"] for group in groups]
    assert ("log", "log") not in list(itertools.pairwise(firsts))


def opened(folder: Path) -> tuple[TrackerProcess, Path]:
    process, file = TrackerProcess(MODULE), folder / "notes"
    process.ask({"kind": "open", "file": str(file)})
    return process, file


def notes(file: Path) -> list[list[str]]:
    lines = map(json.loads, file.read_text().splitlines())
    return [[message["kind"] for message in line] for line in lines]


@pytest.mark.process
def test_records_that_wait_come_together_and_prints_and_signals_disturb_nothing(
    tmp_path: Path,
) -> None:
    process, file = opened(tmp_path)
    process.send({"kind": "sleep", "seconds": 0.5})
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(process._process.pid, number)
    for _ in range(5):
        process.send(LOG)
    process.ask({"kind": "print"})
    # A child of this process, such as a worker that loads data, holds the pipe open.
    assert process._process.stdin is not None
    with subprocess.Popen(["sleep", "60"], pass_fds=[process._process.stdin.fileno()]) as child:
        process.finish({"kind": "finish"})
        child.kill()
    assert notes(file) == [["open"], ["sleep"], ["log"] * 5, ["print"], ["finish"]]


@pytest.mark.process
def test_an_error_comes_back_with_its_text_and_the_last_step(tmp_path: Path) -> None:
    process, file = opened(tmp_path)
    process.send(LOG)
    with pytest.raises(TrackerProcessError, match="^ValueError: no such thing$") as raised:
        process.ask({"kind": "fail"})
    assert raised.value.step == 7
    # The handler may still end what it has begun, and nothing is left of the process.
    assert notes(file)[-2:] == [["fail"], []]
    assert process._process.returncode == 1

    # Nobody waits for a record; the next ones find out.
    process, _ = opened(tmp_path)
    process.send({"kind": "fail"})
    with pytest.raises(TrackerProcessError, match="^ValueError: no such thing$") as raised:
        send_until(process, 20)
    assert raised.value.step is None


@pytest.mark.process
def test_one_that_was_killed_or_cannot_start_is_told(tmp_path: Path) -> None:
    process, _ = opened(tmp_path)
    os.kill(process._process.pid, signal.SIGKILL)
    with pytest.raises(TrackerProcessError, match="^its process was killed$"):
        send_until(process, 20)

    process, _ = opened(tmp_path)
    process.kill()
    with pytest.raises(TrackerProcessError, match="^its process was killed$"):
        process.finish({"kind": "finish"})

    with pytest.raises(TrackerProcessError, match="No module named"):
        TrackerProcess("tests.track.no_such_module").ask({"kind": "open"})


def send_until(process: TrackerProcess, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        process.send(LOG)
        time.sleep(0.01)


RUN = """
import sys, time
from llmtune.track.apart.process import TrackerProcess

process = TrackerProcess(sys.argv[1])
process.ask({"kind": "open", "file": sys.argv[2]})
process.send({"kind": "log", "record": {"step": 1}})
process._process.stdin.write("{half of a li")
process._process.stdin.flush()
print(process._process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.process
def test_it_ends_with_the_run_that_was_killed(tmp_path: Path) -> None:
    """What came before is handled, and the handler is told that there is no more."""
    file = tmp_path / "notes"
    command = [sys.executable, "-c", RUN, MODULE, str(file)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        other = psutil.Process(int(run.stdout.readline()))
        run.kill()
    psutil.wait_procs([other], 20)
    assert not other.is_running() or other.status() == psutil.STATUS_ZOMBIE
    assert notes(file) == [["open"], ["log"], []]

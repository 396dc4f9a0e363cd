"""What ranks print reaches the log without secrets: all of it, in order, also the last words of one
that is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from llmtune.launch.processes.log_filter import wait_for_filters
from llmtune.launch.supervise.attempt import run_ranks
from llmtune.launch.supervise.out_of_memory import RanOutOfMemoryError
from llmtune.process import STOP_SIGNALS
from tests.support import ROOT

VALUE = "planted-hf_0123456789"


class Rank:
    """A process whose output was redirected, as a rank's is."""

    def __init__(self, folder: Path, body: str, **environment: str):
        self.log = folder / "train.log"
        start = (
            "from llmtune.launch.supervise.rank_report import"
            " redirect_output\nredirect_output(Path(sys.argv[1]))\n"
        )
        script = (
            "import os, signal, subprocess, sys, time\nfrom pathlib import Path\n"
            + start
            + textwrap.dedent(body)
        )
        clean = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, str(self.log)],
            cwd=ROOT,
            env={**clean, "PYTHONUNBUFFERED": "1", **environment},
            start_new_session=True,
        )

    def finish(self) -> str:
        """The log, as whoever waited for the rank finds it."""
        self.process.wait(30)
        wait_for_filters(self.log)
        return self.read()

    def read(self) -> str:
        """The log of now; carriage returns and halves of characters stay what they are."""
        return self.log.read_bytes().decode(errors="replace")

    def filters(self) -> list[int]:
        """Processes that filter this rank."""
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = file.read_text()
            except OSError:
                continue
            if "log_filter" in command and f"main({self.process.pid})" in command:
                found.append(int(file.parent.name))
        return found

    def wait_for(self, text: str) -> str:
        """The log as soon as ``text`` is in it."""
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            if self.log.exists() and text in self.read():
                return self.read()
            time.sleep(0.05)
        raise AssertionError(f"{text!r} did not come: {self.read()!r}")


@pytest.mark.process
def test_secrets_are_taken_out_past_python_and_in_subprocesses(tmp_path: Path) -> None:
    body = """
        import ctypes
        secret = os.environ["HF_TOKEN"]
        print("print", secret)
        print("stderr", secret, file=sys.stderr)
        os.write(1, f"write {secret}\\n".encode())
        ctypes.CDLL(None).puts(f"puts {secret}".encode())
        ctypes.CDLL(None).fflush(None)
        subprocess.run(["sh", "-c", "echo child $HF_TOKEN; env"])
        os.write(2, f"no end of line {secret}".encode())
    """
    text = Rank(tmp_path, body, HF_TOKEN=VALUE).finish()
    for source in ("print", "stderr", "write", "puts", "child", "no end of line"):
        assert f"{source} ***HF_TOKEN***" in text
    assert "HF_TOKEN=***HF_TOKEN***" in text
    assert VALUE not in text


@pytest.mark.process
@pytest.mark.parametrize(
    "end", ["os.abort()", "os.kill(os.getpid(), 9)", "os.killpg(0, 9)", "os._exit(3)"]
)
def test_last_words_arrive_however_a_rank_ends(tmp_path: Path, end: str) -> None:
    rank = Rank(
        tmp_path, f"os.write(2, b'x' * 200000 + b'\\nterminate called')\n{end}", HF_TOKEN=VALUE
    )
    assert rank.finish().endswith("x\nterminate called")
    assert rank.process.returncode != 0
    assert len(rank.log.read_text()) == 200000 + len("\nterminate called")


@pytest.mark.process
def test_lines_stay_in_order(tmp_path: Path) -> None:
    body = """
        for number in range(20000):
            os.write(1 + number % 2, f"{number} {os.environ['HF_TOKEN']}\\n".encode())
    """
    text = Rank(tmp_path, body, HF_TOKEN=VALUE).finish()
    assert text == "".join(f"{number} ***HF_TOKEN***\n" for number in range(20000))


@pytest.mark.process
def test_a_progress_bar_is_shown_and_a_secret_in_two_pieces_is_not(tmp_path: Path) -> None:
    body = f"""
        os.write(1, "\\r45% ".encode() + "█".encode()[:2])
        time.sleep(1)
        os.write(1, "█".encode()[2:] + b" {VALUE[:9]}")
        time.sleep(1)
        os.write(1, b"{VALUE[9:]} 46%")
        time.sleep(600)
    """
    rank = Rank(tmp_path, body, HF_TOKEN=VALUE)
    try:
        assert VALUE[:4] not in rank.wait_for("45% ")
        assert "45% █ ***HF_TOKEN*** 46%" in rank.wait_for(" 46%")
    finally:
        rank.process.kill()
    assert rank.finish() == "\r45% █ ***HF_TOKEN*** 46%"


@pytest.mark.process
@pytest.mark.parametrize("child", ["while echo talk; do sleep 0.1; done", "echo talk; sleep 600"])
def test_a_child_that_holds_on_to_the_pipe_does_not_keep_the_filter(
    tmp_path: Path, child: str
) -> None:
    rank = Rank(
        tmp_path, f"subprocess.Popen(['sh', '-c', {child!r}])\ntime.sleep(0.5)", HF_TOKEN=VALUE
    )
    try:
        assert "talk" in rank.finish()
        assert not rank.filters()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.process.pid, signal.SIGKILL)


@pytest.mark.process
def test_signals_to_the_filter_are_the_ranks_business(tmp_path: Path) -> None:
    body = """
        signal.signal(signal.SIGTERM, lambda *_: (print("saved"), os._exit(75)))
        print("ready")
        time.sleep(600)
    """
    rank = Rank(tmp_path, body, HF_TOKEN=VALUE)
    rank.wait_for("ready")
    (log_filter,) = rank.filters()
    for number in STOP_SIGNALS:
        os.kill(log_filter, number)
    # Each would have ended it by now.
    time.sleep(0.1)
    os.killpg(rank.process.pid, signal.SIGTERM)
    assert rank.finish() == "ready\nsaved\n"
    assert rank.process.returncode == 75
    time.sleep(0.1)
    assert not rank.filters()


@pytest.mark.process
def test_without_secrets_there_is_no_filter(tmp_path: Path) -> None:
    text = Rank(tmp_path, "print(os.readlink('/proc/self/fd/1'))").finish()
    assert text == f"{tmp_path / 'train.log'}\n"


@pytest.mark.process
def test_the_supervisor_reads_what_went_through_the_filter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", VALUE)
    log = tmp_path / "train.log"
    script = f"""
import os
from pathlib import Path
from llmtune.launch.supervise.rank_report import redirect_output
redirect_output(Path({str(log)!r}))
if os.environ["RANK"] == "1":
    os.write(2, b"what():  std::bad_alloc {VALUE}")
    os.abort()
"""
    with pytest.raises(RanOutOfMemoryError, match=r"rank 1.*std::bad_alloc \*\*\*HF_TOKEN"):
        run_ranks(["-c", script], 2, log, lambda _: None)
    assert VALUE not in log.read_text()

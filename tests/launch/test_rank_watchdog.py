"""A rank that nobody watches ends itself when it no longer gets on, and leaves its stacks
behind.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.support import ROOT

_PRELUDE = """
import sys, threading, time
from pathlib import Path
from llmtune.engine.phases.heartbeat import PhaseLog
from llmtune.launch.supervise.rank_watchdog import RankWatchdog
run = Path(sys.argv[1])
watch = RankWatchdog(3, run, lambda text: print(text, flush=True))
phases = PhaseLog(watch.record)
print(watch.record.parent, flush=True)
def reach(step, phase="forward"):
    phases.step = step
    phases.enter(phase)
"""


def start(body: str, folder: Path) -> tuple[int, str, float]:
    """A process with these lines in it: its exit code, what it printed, how long it ran."""
    started = time.monotonic()
    code = _PRELUDE + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout, time.monotonic() - started


@pytest.mark.process
def test_a_rank_that_waits_in_vain_ends_and_says_where_it_stood(tmp_path: Path) -> None:
    code, out, seconds = start(
        """
        def wait_for_a_lost_node():
            threading.Event().wait()
        with watch.watch(1.0):
            reach(7)
            wait_for_a_lost_node()
        """,
        tmp_path,
    )
    assert (code, seconds < 20) == (1, True)
    (stacks,) = tmp_path.glob("stacks-rank3-*Z.txt")
    assert "in wait_for_a_lost_node" in stacks.read_text()
    assert "forward, step 7" in stacks.read_text()
    record, said = out.strip().split("\n")
    assert "rank 3 on" in said
    assert "1 s (launch.hang_timeout" in said
    assert str(stacks) in said
    assert not Path(record).exists(), "nothing is left in /tmp"


@pytest.mark.process
def test_before_the_first_step_it_has_ten_times_as_long(tmp_path: Path) -> None:
    code, out, _ = start(
        """
        with watch.watch(0.4):
            reach(0, "load")
            time.sleep(2)
        watch.remove()
        """,
        tmp_path,
    )
    assert (code, out.count("\\n"), list(tmp_path.iterdir())) == (0, 0, [])


@pytest.mark.process
def test_a_rank_that_beats_or_has_left_the_block_goes_on(tmp_path: Path) -> None:
    code, out, _ = start(
        """
        with watch.watch(1.0):
            reach(1)
            for _ in range(8):
                time.sleep(0.3)
                phases.beat()
        time.sleep(2)
        watch.remove()
        print("done")
        """,
        tmp_path,
    )
    assert (code, out.endswith("done\n"), list(tmp_path.iterdir())) == (0, True, [])


@pytest.mark.process
def test_a_run_folder_that_is_gone_keeps_no_rank_alive(tmp_path: Path) -> None:
    code, out, _ = start(
        """
        with watch.watch(1.0):
            reach(1)
            threading.Event().wait()
        """,
        tmp_path / "gone",
    )
    assert code == 1
    assert "could not be saved (No such file or directory)" in out

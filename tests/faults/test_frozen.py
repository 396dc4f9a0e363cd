"""A rank is frozen with SIGSTOP: the supervisor detects the hang, keeps the stacks, and starts
again.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from llmtune.storage.rank_files import RestartRecord
from tests.faults.conftest import Undisturbed
from tests.faults.harness import Run, Table, judge, take_snapshot

pytestmark = pytest.mark.process

HANG_SECONDS = 4


@pytest.mark.parametrize(
    ("victim", "event", "step"),
    [
        pytest.param("1", "step", 10, id="chosen: rank 1 in a step"),
        pytest.param("0", "step", 6, id="rank 0 in a step", marks=pytest.mark.slow),
        pytest.param("1", "evaluate", 16, id="rank 1 in an evaluation", marks=pytest.mark.slow),
        pytest.param("1", "save", 12, id="rank 1 in a save", marks=pytest.mark.slow),
    ],
)
def test_a_frozen_rank_is_noticed_and_started_again(
    victim: str, event: str, step: int, undisturbed: Undisturbed, table: Table, tmp_path: Path
) -> None:
    reference = undisturbed("zero=2")
    run = Run(tmp_path, ["zero=2", f"launch.hang_timeout={HANG_SECONDS}"])
    with table.trial(
        "a rank frozen with SIGSTOP", f"rank {victim} in {event} {step}", run
    ) as trial:
        slow = {"step:*": 0.1, f"write:{step}": 0.025, "evaluate:*": 0.5}
        run.start(slow=slow)
        run.wait_for(event, step, victim)
        moment = run.send(victim, signal.SIGSTOP)
        frozen = run.pid(victim)
        time.sleep(0.5)
        snapshot = take_snapshot(run, moment)
        code = run.end()
        assert code == 0, (code, run.console)
        assert not Path(f"/proc/{frozen}").exists(), "also a frozen process goes"
        (restart,) = RestartRecord.read_all(run.path)
        assert f"no rank made progress for {HANG_SECONDS} s" in restart.reason
        (stacks,) = run.path.glob("stacks-*.txt")
        text = stacks.read_text()
        assert f"no answer from rank {victim}" in text, text
        assert "Thread 0x" in text or "Current thread" in text, "the other rank's stack"
        judge(run, trial, reference, snapshot)

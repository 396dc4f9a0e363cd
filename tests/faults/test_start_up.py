"""kill -9 in start-up, before and while ranks start, under the supervisor and under torchrun:
nothing is left or blocked.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Undisturbed
from tests.faults.harness import BASE, Run, Table, judge
from tests.support import ROOT, free_port

pytestmark = [pytest.mark.process, pytest.mark.slow]

TORCHRUN = Path(sys.executable).parent / "torchrun"

#: Where the start stands: a gate of ``inside/sitecustomize.py``, and what that is.
PLACES = {
    "prepare": "the supervisor prepares, and its ranks import",
    "start@0": "rank 0 has only its interpreter, rank 1 goes on",
    "start@1": "rank 1 has only its interpreter, rank 0 goes on",
    "load": "a rank is about to build the model",
    "evaluate:0": "the first evaluation",
}


@pytest.mark.parametrize("gate", PLACES)
@pytest.mark.parametrize("victim", ["0", "1", "supervisor"])
def test_whoever_is_killed_in_start_up_the_run_comes_to_its_end(
    victim: str, gate: str, undisturbed: Undisturbed, table: Table, tmp_path: Path
) -> None:
    reference = undisturbed("zero=2")
    run = Run(tmp_path, ["zero=2"])
    who = "the supervisor" if victim == "supervisor" else "a rank"
    with table.trial(f"kill -9 of {who} in start-up", f"{victim}, {PLACES[gate]}", run) as trial:
        run.start(gates=[gate])
        run.wait_at(gate)
        run.wait_for("start", rank=victim)
        run.send(victim, signal.SIGKILL)
        if victim == "supervisor":
            assert run.end() == -signal.SIGKILL
            # One that is held before its first line must end, too, once it goes on.
            run.open(gate)
            trial.orphans += run.count_orphans()
            run.finish()
        else:
            run.open(gate)
            assert run.end() == 0, run.console
            assert f"rank {victim} ended with signal SIGKILL" in run.console
        judge(run, trial, reference, None, killed=victim == "supervisor")


class Launched(Run):
    """A run whose ranks torchrun starts, in a session of its own."""

    def __init__(self, folder: Path):
        super().__init__(
            folder, ["zero=2"], [text for text in BASE if not text.startswith("launch.nproc")]
        )

    def start(
        self, *more: str, slow: object = None, gates: object = (), env: dict[str, str] | None = None
    ) -> None:
        """``torchrun`` on this machine."""
        self.starts += 1
        where = ["--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
        command = [
            str(TORCHRUN),
            *where,
            "--module",
            "llmtune",
            *self.overrides,
            f"output_dir={self.path}",
            *more,
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent / "inside"),
            "FAULT_DIR": str(self.traces),
            "FAULT_SLOW": "{}",
            "FAULT_GATES": json.dumps(gates),
            "LLMTUNE_FAULT_ID": self.mark,
            # As on one machine under the supervisor, for the same digits.
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            **(env or {}),
        }
        with self._console_file().open("wb") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
            )


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    run = Launched(tmp_path)
    yield run
    run.clean()


@pytest.mark.parametrize("gate", ["before ranks start", "start@0", "start@1", "load", "step:2"])
def test_torchrun_that_is_killed_in_start_up_leaves_nothing_and_the_same_command_starts_again(
    gate: str, launched: Launched, undisturbed: Undisturbed, table: Table
) -> None:
    reference = undisturbed("zero=2")
    with table.trial("kill -9 of torchrun in start-up", gate, launched) as trial:
        if gate == "before ranks start":
            launched.start()
            launched.wait_for("start", rank="supervisor")
        else:
            launched.start(gates=[gate])
            launched.wait_at(gate)
        assert launched.process is not None
        launched.process.kill()
        assert launched.end() == -signal.SIGKILL
        if gate.startswith("start"):
            # Its launcher is gone before it has run a line of its own.
            time.sleep(0.5)
            launched.open(gate)
        trial.orphans += launched.count_orphans()
        launched.finish()
        judge(launched, trial, reference, None, killed=True)

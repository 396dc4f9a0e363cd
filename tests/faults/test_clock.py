"""A clock that is set back, between two starts and in the middle of a run (libfaketime)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.faults.conftest import Undisturbed
from tests.faults.harness import Run, Table, judge, take_snapshot

pytestmark = [pytest.mark.process, pytest.mark.slow]


@pytest.fixture(scope="module")
def clock() -> dict[str, str]:
    """The environment in which a process has a clock of its own; the monotonic one stays as it is,
    as it does in earnest.
    """

    def find() -> Path | None:
        return next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)

    if find() is None and os.getuid() == 0 and shutil.which("apt-get"):
        subprocess.run(
            ["apt-get", "install", "-y", "-q", "faketime"],
            check=False,
            capture_output=True,
            timeout=300,
        )
    library = find()
    if library is None:
        pytest.skip("libfaketime is missing: apt-get install faketime")
    return {"LD_PRELOAD": str(library), "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


def test_a_clock_set_back_between_two_starts_changes_nothing(
    clock: dict[str, str], undisturbed: Undisturbed, table: Table, tmp_path: Path
) -> None:
    reference = undisturbed("zero=2")
    run = Run(tmp_path, ["zero=2"])
    with table.trial("clock set back two days", "between two starts", run) as trial:
        run.start(gates=["step:18"])
        run.wait_at("step:18")
        moment = run.send("supervisor", signal.SIGKILL)
        snapshot = take_snapshot(run, moment)
        run.end()
        trial.orphans += run.count_orphans()
        run.finish(env={**clock, "FAKETIME": "-2d"})
        judge(run, trial, reference, snapshot, killed=True)


def test_a_clock_set_back_in_mid_run_changes_nothing(
    clock: dict[str, str], undisturbed: Undisturbed, table: Table, tmp_path: Path
) -> None:
    """And a rank that fails after that is started again from the newest checkpoint, whatever its
    time stamp says.
    """
    reference = undisturbed("zero=2")
    run = Run(tmp_path / "r", ["zero=2"])
    stamp = tmp_path / "clock"
    stamp.write_text("+0d\n")
    with table.trial("clock set back two days", "in mid-run", run) as trial:
        env = {**clock, "FAKETIME_TIMESTAMP_FILE": str(stamp), "FAKETIME_NO_CACHE": "1"}
        run.start(gates=["step:10", "step:18"], env=env)
        run.wait_at("step:10")
        stamp.write_text("-2d\n")
        run.open("step:10")
        run.wait_at("step:18")
        moment = run.send("1", signal.SIGKILL)
        snapshot = take_snapshot(run, moment)
        run.open("step:18")
        code = run.end()
        assert code == 0, (code, run.console)
        judge(run, trial, reference, snapshot)

"""Ranks that were started ahead, while the supervisor still prepares: whatever happens then, none
is left, and none is missed.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Undisturbed
from tests.faults.harness import BASE, Run, Table, judge
from tests.support import run_cli

pytestmark = pytest.mark.process

#: The supervisor has begun to prepare, and its ranks import.
GATE = "prepare"


def start_to_the_gate(run: Run) -> None:
    """Until both ranks are there and wait."""
    run.start(gates=[GATE])
    run.wait_at(GATE)
    for rank in "01":
        run.wait_for("start", rank=rank)


@pytest.mark.slow
def test_a_supervisor_killed_while_they_wait_leaves_none(table: Table, tmp_path: Path) -> None:
    run = Run(tmp_path)
    with table.trial("kill -9 of the supervisor, while ranks wait", GATE, run) as trial:
        start_to_the_gate(run)
        run.send("supervisor", signal.SIGKILL)
        assert run.end() == -signal.SIGKILL
        trial.orphans += run.count_orphans()
        run.finish()
        trial.resumed = True


def test_a_rank_killed_while_it_waits_is_started_again(
    undisturbed: Undisturbed, table: Table, tmp_path: Path
) -> None:
    reference = undisturbed("zero=2")
    run = Run(tmp_path, ["zero=2"])
    with table.trial("kill -9 of a rank, while it waits", GATE, run) as trial:
        start_to_the_gate(run)
        run.send("1", signal.SIGKILL)
        run.open(GATE)
        assert run.end() == 0, run.console
        assert "rank 1 ended with signal SIGKILL" in run.console
        judge(run, trial, reference, None)


def test_a_signal_while_they_wait_ends_all_in_seconds(table: Table, tmp_path: Path) -> None:
    run = Run(tmp_path)
    with table.trial("SIGTERM while ranks wait", GATE, run) as trial:
        start_to_the_gate(run)
        sent = run.send("supervisor", signal.SIGTERM)
        run.open(GATE)
        assert run.end() == 75, run.console
        assert time.monotonic() - sent < 5
        trial.orphans += run.count_orphans()
        trial.resumed = True


@pytest.mark.slow
def test_they_are_ended_where_the_data_is_refused(table: Table, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": []}\n')
    run = Run(tmp_path / "r", [f"data.train={rows}"])
    with table.trial("data refused while ranks wait", "no row", run) as trial:
        run.start()
        assert run.end() == 4, run.console
        assert f"{rows}:1" in run.console
        trial.orphans += run.count_orphans()
        trial.resumed = True


@pytest.mark.slow
def test_none_is_started_for_a_finished_run(undisturbed: Undisturbed, tmp_path: Path) -> None:
    reference = undisturbed("zero=2")
    run = Run(tmp_path, ["zero=2"])
    run.path = reference.path
    run.start()
    assert run.end() == 0, run.console
    assert "finished:" in run.console
    assert {event["rank"] for event in run.events()} == {"supervisor"}


def test_what_libraries_print_while_they_are_imported_stays_off_the_console(tmp_path: Path) -> None:
    """A package that warns on import, in every process."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Loud:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'llmtune.train.builders.job' and 'RANK' in os.environ:\n"
        "            print('a loud library', flush=True)\n"
        "sys.meta_path.insert(0, Loud)\n"
    )
    done = run_cli(*BASE, f"output_dir={tmp_path}/run", env={"PYTHONPATH": str(tmp_path / "site")})
    assert done.code == 0, done.err
    assert "a loud library" not in done.out + done.err
    assert (tmp_path / "run" / "train.log").read_text().count("a loud library") == 2

"""``resume_from_checkpoint=PATH``, stopped or killed wherever it stands, and the same command
again, until it is done.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Undisturbed
from tests.faults.harness import (
    SAVE_STEPS,
    STEPS,
    Reference,
    Run,
    Snapshot,
    Table,
    find_lost,
    judge_folder,
    judge_resume,
    read_lines,
    take_snapshot,
)

pytestmark = [pytest.mark.process, pytest.mark.slow]

FAULT = "begun from PATH, stopped, and the same command again"


def judge_part(run: Run, reference: Reference, first: int) -> list[str]:
    """The steps from ``first`` on have one line each, with the numbers of the undisturbed run."""
    losses, evaluations = read_lines(run.path)
    wanted = {step: [values] for step, values in reference.losses.items() if step >= first}
    held_out = {step: [value] for step, value in reference.evaluations.items() if step >= first}
    problems = [] if losses == wanted else [f"losses {losses} instead of {wanted}"]
    if {step: values for step, values in evaluations.items() if step >= first} != held_out:
        problems.append(f"evaluations {evaluations} instead of {held_out}")
    return problems + [f"{path.name}: set aside" for path in run.path.glob("superseded-*")]


def test_a_stop_is_gone_on_from_and_not_the_path(
    undisturbed: Undisturbed, table: Table, tmp_path: Path
) -> None:
    """The second start finds the path gone, too."""
    reference = undisturbed("zero=2")
    path, begun = tmp_path / "elsewhere" / "checkpoint-20", STEPS - SAVE_STEPS
    shutil.copytree(reference.path / f"checkpoint-{begun}", path)
    run = Run(tmp_path, ["zero=2", f"resume_from_checkpoint={path}"])
    with table.trial(FAULT, "SIGTERM in step 22", run) as trial:
        run.start(gates=["step:22"])
        run.wait_at("step:22")
        snapshot = take_snapshot(run, time.monotonic())
        run.send("supervisor", signal.SIGTERM)
        time.sleep(0.5)
        run.open("step:22")
        assert run.end() == 75, run.console
        trial.orphans += run.count_orphans()
        stopped = run.last_step(time.monotonic())
        shutil.rmtree(path)
        run.finish()
        assert run.resumed_step() == stopped, run.console
        trial.wrong += (
            judge_part(run, reference, begun + 1) + judge_folder(run) + find_lost(run, snapshot)
        )
        trial.resumed = True


def break_off(run: Run, how: str, step: int) -> Snapshot:
    """Let it come into a step, and end it there; what stood then."""
    gate = f"step:{step}"
    run.start(gates=[gate])
    run.wait_at(gate)
    snapshot = take_snapshot(run, time.monotonic())
    run.send("supervisor", signal.SIGTERM if how == "stopped" else signal.SIGKILL)
    if how == "stopped":
        time.sleep(0.5)
    run.open(gate)
    assert run.end() == (75 if how == "stopped" else -signal.SIGKILL), run.console
    (run.traces / f"at {gate}").unlink()
    (run.traces / f"open {gate}").unlink()
    return snapshot


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_a_queue_of_stops_and_kills_comes_to_the_end(
    zero: int, seed: int, undisturbed: Undisturbed, table: Table, tmp_path: Path
) -> None:
    reference = undisturbed(f"zero={zero}")
    first = Run(tmp_path / "first", [f"zero={zero}"])
    run = Run(
        tmp_path / "second",
        [f"zero={zero}", f"resume_from_checkpoint={first.path}/checkpoint-{SAVE_STEPS}"],
    )
    draw, stood = random.Random(seed), Snapshot({}, SAVE_STEPS, None)
    with table.trial(FAULT, f"four times, ZeRO {zero}, draw {seed}", first, run) as trial:
        first.start(gates=[f"step:{SAVE_STEPS + 2}"])
        first.wait_until(lambda: first.complete() or None, f"checkpoint-{SAVE_STEPS}")
        first.send("supervisor", signal.SIGKILL)
        assert first.end() == -signal.SIGKILL
        step = SAVE_STEPS
        for number in range(4):
            step += draw.randint(1, 4)
            how = draw.choice(("stopped", "killed"))
            snapshot = break_off(run, how, step)
            trial.orphans += run.count_orphans()
            trial.wrong += find_lost(run, snapshot)
            if number:
                judge_resume(run, trial, stood)
            stood = take_snapshot(run, time.monotonic())
            if run.complete() and first.path.exists():
                # Pruned, or moved away.
                shutil.rmtree(first.path)
        run.finish()
        trial.orphans += run.count_orphans()
        trial.wrong += judge_part(run, reference, SAVE_STEPS + 1) + judge_folder(run)
        trial.resumed = True

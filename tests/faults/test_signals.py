"""Signals, and a file named SAVE, wherever a run stands: exit 75, and the same command resumes
without a step done twice.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Undisturbed
from tests.faults.harness import STEPS, Run, Table, find_lost, judge, take_snapshot

pytestmark = pytest.mark.process

PLACES = {
    "start-up of the supervisor": "prepare",
    "start-up of the ranks": "load",
    "the first evaluation": "evaluate:0",
    "a step": "step:10",
    "an evaluation": "evaluate:8",
    "a save": "file:12:manifest.json",
    "the last save": "file:24:trainer_state.json",
}
KINDS = {
    name: f"{name} in start-up, step, evaluation, save" for name in ("SIGTERM", "SIGUSR1", "SIGINT")
}
KINDS["SAVE"] = "a file named SAVE in start-up, step, evaluation, save"
TRIALS = [
    *(("SIGTERM", place) for place in PLACES if place != "an evaluation"),
    *(("SIGUSR1", place) for place in ("start-up of the supervisor", "a step", "a save")),
    *(("SIGINT", place) for place in ("start-up of the ranks", "a step", "an evaluation")),
    *(("SAVE", place) for place in ("start-up of the ranks", "a step", "an evaluation", "a save")),
]


@pytest.mark.parametrize(
    ("what", "place"),
    [
        pytest.param("SIGTERM", "an evaluation", id="chosen: SIGTERM in an evaluation"),
        *(
            pytest.param(what, place, id=f"{what} in {place}", marks=pytest.mark.slow)
            for what, place in TRIALS
        ),
    ],
)
def test_a_stop_saves_and_the_same_command_goes_on(
    what: str, place: str, undisturbed: Undisturbed, table: Table, tmp_path: Path
) -> None:
    reference = undisturbed("zero=2")
    run = Run(tmp_path, ["zero=2"])
    gate = PLACES[place]
    with table.trial(KINDS[what], f"{place}, {gate}", run) as trial:
        run.start(gates=[gate])
        run.wait_at(gate)
        before = take_snapshot(run, time.monotonic())
        if what == "SAVE":
            (run.path / "SAVE").touch()
        else:
            run.send("supervisor", signal.Signals[what])
        # Longer than the supervisor takes to hand it on.
        time.sleep(0.5)
        run.open(gate)
        code = run.end()
        # Behind the last step there is nothing to stop but the export.
        assert code in ((75, 0) if place == "the last save" else (75,)), (code, run.console)
        assert code == 0 or "same command" in run.console, run.console
        if place != "the last save":
            # Exit code 75 is also that of a run which was asked to stop and went on to its end.
            assert run.last_step(time.monotonic()) < STEPS, "it did not stop"
        assert not (run.path / "SAVE").exists(), "it was heard"
        trial.orphans += run.count_orphans()
        trial.wrong += [f"{path} was left behind" for path in run.shared_memory()]
        trial.wrong += find_lost(run, before)
        snapshot = take_snapshot(run, time.monotonic())
        # Asked in the last save, it may be trained to the end; the same command then only says so.
        trained = (run.path / "finished.json").exists()
        run.finish()
        judge(run, trial, reference, None if trained else snapshot)
        if trial.lost_steps:
            trial.wrong.append(
                f"{trial.lost_steps} steps were done twice after a stop that was asked for"
            )

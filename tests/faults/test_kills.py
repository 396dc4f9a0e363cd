"""kill -9 of each rank and of the supervisor, at 40 random moments; half of them inside a save."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.conftest import Undisturbed
from tests.faults.harness import SAVED_STEPS, STEPS, Run, Table, find_lost, judge, take_snapshot

pytestmark = pytest.mark.process

SEED = 20261122
VICTIMS = ("0", "1", "supervisor")
#: Slept at each of the 42 tensors of a rank's share, and at what is flushed: more than two seconds
#: a save.
WRITE_SECONDS = 0.025
SAVE_SECONDS = 1.0
#: Less than a whole run takes: the victim must be there.
START_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Kill:
    """Who dies when."""

    victim: str
    event: str
    """What has just begun: ``save``, ``step``, ``evaluate``, or ``start`` of the victim itself."""
    step: int | None
    delay: float
    """Seconds after that."""
    background: bool
    zero: int

    def __str__(self) -> str:
        where = self.event + (f" {self.step}" if self.step is not None else "")
        who = f"rank {self.victim}" if self.victim.isdigit() else self.victim
        return (
            f"{who}, {where} + {self.delay:.2f} s,"
            f" {'background' if self.background else 'in line'}, ZeRO {self.zero}"
        )


def draw_kill(number: int) -> Kill:
    """The same kill for the same number."""
    drawn = random.Random(SEED * 1000 + number)
    victim, zero, background = VICTIMS[number % 3], drawn.choice((2, 3)), drawn.random() < 0.5
    if number % 2 == 0:
        return Kill(
            victim=victim,
            event="save",
            step=drawn.choice(SAVED_STEPS),
            delay=drawn.uniform(0, SAVE_SECONDS),
            background=background,
            zero=zero,
        )
    event = drawn.choices(("step", "evaluate", "start"), (6, 2, 2))[0]
    if event == "step":
        return Kill(
            victim=victim,
            event=event,
            step=drawn.randrange(1, STEPS + 1),
            delay=drawn.uniform(0, 0.2),
            background=background,
            zero=zero,
        )
    if event == "evaluate":
        return Kill(
            victim=victim,
            event=event,
            step=drawn.choice((0, 8, 16, 24)),
            delay=drawn.uniform(0, 0.4),
            background=background,
            zero=zero,
        )
    return Kill(
        victim=victim,
        event=event,
        step=None,
        delay=drawn.uniform(0, START_SECONDS),
        background=background,
        zero=zero,
    )


#: In the ordinary suite: a rank in a step, a rank and the supervisor inside a save.
CHOSEN = {
    "step": Kill(victim="1", event="step", step=14, delay=0.07, background=True, zero=2),
    "save of a rank": Kill(victim="0", event="save", step=12, delay=0.6, background=False, zero=2),
    "save of the supervisor": Kill(
        victim="supervisor", event="save", step=16, delay=0.8, background=True, zero=2
    ),
}
KILLS = [
    pytest.param(
        kill,
        id=f"chosen: {kill}",
        marks=[pytest.mark.slow] if name == "save of the supervisor" else [],
    )
    for name, kill in CHOSEN.items()
]
KILLS += [
    pytest.param(draw_kill(number), id=f"{number}: {draw_kill(number)}", marks=pytest.mark.slow)
    for number in range(40)
]


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_process_costs_no_more_than_the_steps_since_the_last_save(
    kill: Kill, undisturbed: Undisturbed, table: Table, tmp_path: Path
) -> None:
    reference = undisturbed(f"zero={kill.zero}")
    run = Run(
        tmp_path, [f"zero={kill.zero}", f"checkpoint.background={str(kill.background).lower()}"]
    )
    who = "the supervisor" if kill.victim == "supervisor" else "a rank"
    written = "written in the background" if kill.background else "written at once"
    where = f"inside a save {written}" if kill.event == "save" else "anywhere else"
    with table.trial(f"kill -9 of {who}, {where}", str(kill), run) as trial:
        slow = {f"write:{kill.step}": WRITE_SECONDS} if kill.event == "save" else {}
        run.start(slow={**slow, "step:*": 0.06, "evaluate:*": 0.3})
        begun = run.wait_for(kill.event, kill.step, kill.victim if kill.event == "start" else None)
        time.sleep(max(0.0, begun + kill.delay - time.monotonic()))
        moment = time.monotonic()
        snapshot = take_snapshot(run, moment)
        run.send(kill.victim, signal.SIGKILL)
        if kill.event == "save":
            assert snapshot.saving == kill.step, "it was inside the save"
        if kill.victim == "supervisor":
            assert run.end() == -signal.SIGKILL
            trial.orphans += run.count_orphans()
            trial.wrong += find_lost(run, snapshot)
            run.finish()
        else:
            code = run.end()
            assert code == 0, run.console
            assert "starting again" in run.console
            assert (run.path / "restarts.jsonl").is_file()
        judge(run, trial, reference, snapshot, killed=kill.victim == "supervisor")

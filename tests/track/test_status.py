"""Silence does not last: what is under way is said, and no more than that."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable

import pytest

from llmtune.engine.phases.heartbeat import PhaseLog
from llmtune.track.console import Console
from llmtune.track.status import Status

QUIET = 0.05


class Terminal(io.StringIO):
    """A stream that somebody looks at."""

    def isatty(self) -> bool:
        return True


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_silence_is_broken_by_what_is_done() -> None:
    out = io.StringIO()
    with Status(Console(out), "loading the model", QUIET):
        wait_for(lambda: "loading the model ... 0:0" in out.getvalue())


def test_lines_of_one_thing_become_rare_where_they_stay() -> None:
    moments: list[float] = []

    class Watched(Console):
        def progress(self, text: str, passing: bool = False) -> None:
            super().progress(text, passing)
            moments.append(time.monotonic())

    with Status(Watched(io.StringIO()), "loading the model", QUIET):
        wait_for(lambda: len(moments) == 4)
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert all(gap >= (2 << number) * QUIET for number, gap in enumerate(gaps)), gaps


def test_a_console_that_speaks_is_left_alone() -> None:
    out = io.StringIO()
    console = Console(out)
    with Status(console, "loading the model", 5.0):
        began = time.monotonic()
        while time.monotonic() - began < 1.0:
            console.say("a line")
            time.sleep(0.02)
    assert "loading" not in out.getvalue()


def test_where_nothing_is_to_be_said_nothing_is() -> None:
    out = io.StringIO()
    with Status(Console(out), lambda: None, QUIET):
        time.sleep(4 * QUIET)
    assert out.getvalue() == ""


@pytest.mark.parametrize("says_more", [False, True])
def test_on_a_terminal_the_line_goes_when_it_is_no_longer_true(says_more: bool) -> None:
    out = Terminal()
    console = Console(out)
    with Status(console, "loading the model", QUIET) as status:
        wait_for(lambda: "loading" in out.getvalue())
        status.doing = lambda: None
        if says_more:
            console.progress("step 1")
    # One line more may have been under way; all of them are erased.
    last = out.getvalue().rpartition("\x1b[2K")[2]
    assert "loading" not in last
    if says_more:
        assert "step 1" in out.getvalue()


def test_on_a_terminal_a_line_that_stays_takes_its_place() -> None:
    out = Terminal()
    console = Console(out)
    console.progress("loading the model ... 0:05", passing=True)
    console.say("step 0  held-out loss 1.0")
    assert out.getvalue().rpartition("\x1b[2K")[2] == "step 0  held-out loss 1.0\n"


def test_a_block_that_fails_ends_its_thread() -> None:
    status = Status(Console(io.StringIO()), "loading the model", QUIET)
    with pytest.raises(ValueError, match="boom"), status:
        raise ValueError("boom")
    assert not status._thread.is_alive()


def test_phases_are_told_but_for_the_steps_after_the_first() -> None:
    log = PhaseLog()
    told = [log.describe()]
    for phase, step in [
        ("load", 0),
        ("evaluate", 0),
        ("forward", 7),
        ("step", 7),
        ("forward", 8),
        ("save", 8),
        ("step", 9),
    ]:
        log.step = step
        log.enter(phase)
        told.append(log.describe())
    assert told == [
        *("starting the ranks", "loading the model", "taking the held-out loss"),
        "step 7, the first of this start",
        "step 7, the first of this start",
        None,
        "saving",
        None,
    ]

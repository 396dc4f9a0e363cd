"""Silence does not last: what is under way is said, and no more than that."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from llmtune.engine.phases.heartbeat import PhaseLog
from llmtune.track.console import Console
from llmtune.track.status import HANDED_OVER_SECONDS, Status

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
    with Status(Console(out), "loading the model", quiet_seconds=QUIET):
        wait_for(lambda: "loading the model ... 0:0" in out.getvalue())


def test_lines_of_one_thing_keep_coming() -> None:
    moments: list[float] = []

    class Watched(Console):
        def progress(self, text: str, passing: bool = False) -> None:
            super().progress(text, passing)
            moments.append(time.monotonic())

    with Status(Watched(io.StringIO()), "loading the model", quiet_seconds=QUIET):
        wait_for(lambda: len(moments) == 4)
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert all(0.9 * QUIET <= gap < 1 for gap in gaps), gaps


def test_an_activity_that_changes_often_does_not_make_it_silent() -> None:
    """Each step is another one, and none of them lasts as long as the silence."""
    out = io.StringIO()
    steps = itertools.count(1)
    with Status(Console(out), lambda: f"step {next(steps)}", quiet_seconds=QUIET):
        wait_for(lambda: "step " in out.getvalue())


def test_how_far_it_is_stands_beside_it() -> None:
    out, done = io.StringIO(), itertools.count(1)
    with Status(Console(out), "saving", lambda: f"{next(done)} of 9", QUIET):
        wait_for(lambda: "saving, 2 of 9 ... 0:00" in out.getvalue())
    out = io.StringIO()
    with Status(Console(out), "saving", quiet_seconds=QUIET):
        wait_for(lambda: "saving ... 0:00" in out.getvalue())


def test_of_blocks_within_each_other_the_innermost_speaks() -> None:
    out = io.StringIO()
    console = Console(out)
    with Status(console, "the run", quiet_seconds=QUIET):
        with Status(console, "the step", quiet_seconds=QUIET):
            wait_for(lambda: "the step" in out.getvalue())
        with Status(console, lambda: None, quiet_seconds=QUIET):
            time.sleep(4 * QUIET)
        assert "the run" not in out.getvalue()
        wait_for(lambda: "the run" in out.getvalue())
    assert console.watched_by == []


def test_who_takes_over_waits_for_what_the_other_may_have_said_just_now() -> None:
    """While ranks run, the supervisor has nothing to say, and does not know what they said."""
    out, doing = io.StringIO(), list[str | None]([None])
    console = Console(out)
    console.said_at = time.monotonic() - 1000
    with Status(console, lambda: doing[0], quiet_seconds=HANDED_OVER_SECONDS + 0.5):
        time.sleep(1)
        doing[0] = "waiting for the ranks"
        began = time.monotonic()
        wait_for(lambda: "waiting for the ranks" in out.getvalue())
        assert time.monotonic() - began > 0.2


def test_the_next_console_of_a_process_knows_of_the_last_line() -> None:
    first = Console(io.StringIO())
    first.say("a line")
    time.sleep(0.01)
    assert Console(io.StringIO()).said_at == first.said_at


@pytest.mark.process
def test_the_silence_before_the_first_console_counts() -> None:
    """On a busy machine the imports take seconds."""
    program = (
        "import time; time.sleep(1.5); from llmtune.track.console import Console;"
        " print(time.monotonic() - Console(None).said_at)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert 1.4 < float(done.stdout) < 60


def test_a_console_that_nobody_hears_has_no_thread() -> None:
    with Status(Console(None), "loading the model", quiet_seconds=QUIET) as status:
        assert not status._thread.is_alive()


def test_a_console_that_speaks_is_left_alone() -> None:
    out = io.StringIO()
    console = Console(out)
    with Status(console, "loading the model", quiet_seconds=5.0):
        began = time.monotonic()
        while time.monotonic() - began < 1.0:
            console.say("a line")
            time.sleep(0.02)
    assert "loading" not in out.getvalue()


def test_where_nothing_is_to_be_said_nothing_is() -> None:
    out = io.StringIO()
    with Status(Console(out), lambda: None, quiet_seconds=QUIET):
        time.sleep(4 * QUIET)
    assert out.getvalue() == ""


@pytest.mark.parametrize("says_more", [False, True])
def test_on_a_terminal_the_line_goes_when_it_is_no_longer_true(says_more: bool) -> None:
    out = Terminal()
    console = Console(out)
    with Status(console, "loading the model", quiet_seconds=QUIET) as status:
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
    status = Status(Console(io.StringIO()), "loading the model", quiet_seconds=QUIET)
    with pytest.raises(ValueError, match="boom"), status:
        raise ValueError("boom")
    assert not status._thread.is_alive()


def test_what_a_rank_does_is_told_with_how_far_it_is() -> None:
    log = PhaseLog()
    told = [(log.describe(), log.describe_place())]
    for phase, step, how_far in [
        ("load", 0, ""),
        ("evaluate", 0, "batch 3 of 8"),
        ("data", 7, ""),
        ("forward", 7, "micro-batch 1 of 2"),
        ("step", 7, ""),
        ("backward", 8, "micro-batch 2 of 2"),
        ("save", 8, ""),
        ("step", 9, ""),
    ]:
        log.step = step
        log.enter(phase)
        if how_far:
            log.tell(how_far)
        told.append((log.describe(), log.describe_place()))
    first = "step 7, the first of this start"
    assert told == [
        ("starting the ranks", ""),
        ("loading the model", ""),
        ("taking the held-out loss", "batch 3 of 8"),
        (first, "waiting for data"),
        (first, "forward pass, micro-batch 1 of 2"),
        (first, "optimizer step"),
        ("step 8", "backward pass, micro-batch 2 of 2"),
        ("saving", ""),
        ("step 9", "optimizer step"),
    ]

"""The progress line, tables, and a terminal whose reader is gone."""

from __future__ import annotations

import io
import itertools
import os
from types import SimpleNamespace

import pytest

from llmtune.track.console import PLAIN_INTERVAL_SECONDS, Console, ProgressLine
from llmtune.track.status import QUIET_SECONDS
from tests.track.records import record


class Terminal(io.StringIO):
    """A stream that somebody looks at."""

    def isatty(self) -> bool:
        return True


def test_the_progress_line_has_what_a_person_looks_for() -> None:
    out = io.StringIO()
    progress = ProgressLine(Console(out), total_steps=2)
    progress.log({"step": 0, "eval_loss": 3.5, "eval_perplexity": 33.1})
    progress.log(record(1))
    progress.log(record(2))
    text = out.getvalue()
    assert "step 0/2  held-out loss 3.5000  perplexity 33.10" in text
    for part in ("step 2/2", "loss 1.5000", "5 tokens/s", "ETA 0:00", "memory 1.0 GB"):
        assert part in text


def test_the_time_left_is_that_of_steps_and_not_of_what_came_before_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, clock = io.StringIO(), [0.0]
    monkeypatch.setattr("llmtune.track.console.time", SimpleNamespace(monotonic=lambda: clock[0]))
    progress = ProgressLine(Console(out), total_steps=30)
    for step, seconds in ((10, 1000.0), (11, 1040.0), (12, 1080.0), (30, 1800.0)):
        clock[0] = seconds
        progress.log(record(step))
    found = [text.partition("ETA ")[2].split()[0] for text in out.getvalue().splitlines()]
    assert found == ["-", "12:40", "12:00", "0:00"]


@pytest.mark.parametrize("seconds", [0.5, 2.0, 2.9, 4.0, 5.9])
def test_records_are_shown_before_the_silence_is_long(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a step takes, up to the time after which the status speaks."""
    clock, shown = [0.0], [0.0]

    class Watched(Console):
        def progress(self, text: str, passing: bool = False) -> None:
            shown.append(clock[0])

    monkeypatch.setattr("llmtune.track.console.time", SimpleNamespace(monotonic=lambda: clock[0]))
    progress = ProgressLine(Watched(io.StringIO()), total_steps=1000)
    for step in range(1, 200):
        clock[0] += seconds
        progress.log(record(step))
    gaps = [later - earlier for earlier, later in itertools.pairwise(shown)]
    assert max(gaps) <= PLAIN_INTERVAL_SECONDS < QUIET_SECONDS
    assert min(gaps[1:]) > PLAIN_INTERVAL_SECONDS - 2 * seconds


def test_a_terminal_has_a_bar() -> None:
    out = Terminal()
    ProgressLine(Console(out), total_steps=4).log(record(1))
    assert "#####...............  step 1/4" in out.getvalue()


def test_brackets_in_answers_are_no_markup() -> None:
    out = io.StringIO()
    Console(out).table("t", ["a"], [["x[0] [bold]y[/bold]"]])
    assert "x[0] [bold]y[/bold]" in out.getvalue()


def test_a_reader_that_went_away_ends_nothing() -> None:
    """``llmtune | tee log``: Ctrl-C ends tee before the ranks have saved."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as stream:
        console = Console(stream)
        for _ in range(2):
            console.say("saving")
            console.page("title", {"a": "b"})
            console.table("title", ["x"], [["y"]])

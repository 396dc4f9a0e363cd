"""A tracker in a thread of its own: it may be slow, fail, hang or end its thread."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from llmtune.track import background
from llmtune.track.background import BackgroundTracker
from llmtune.track.tracker import Outcome, Trackers
from tests.track.records import record


class Notes:
    """A tracker that remembers what it was told, and in which thread."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.threads: set[int] = set()

    def log(self, record: Any) -> None:
        self.threads.add(threading.get_ident())
        self.told.append(record["step"])

    def summarize(self, values: Any) -> None:
        self.told.append(values)

    def finish(self, outcome: Outcome) -> None:
        self.told.append(outcome)


def test_everything_arrives_in_order_and_in_another_thread() -> None:
    notes, said = Notes(), list[str]()
    trackers = Trackers([BackgroundTracker("Notes", lambda: notes, said.append)])
    for step in range(1, 200):
        trackers.log(record(step))
    trackers.summarize({"best_step": 7})
    trackers.finish(Outcome.finished)
    assert notes.told == [*range(1, 200), {"best_step": 7}, Outcome.finished]
    assert threading.get_ident() not in notes.threads
    assert len(notes.threads) == 1
    assert said == []


def test_training_does_not_wait_for_one_that_opens_slowly() -> None:
    opened, notes = threading.Event(), Notes()

    def open_slowly() -> Notes:
        opened.wait(30)
        return notes

    tracker = BackgroundTracker("Notes", open_slowly, lambda _: None)
    started = time.perf_counter()
    for step in range(1, 101):
        tracker.log(record(step))
    assert time.perf_counter() - started < 1
    assert notes.told == []
    opened.set()
    tracker.finish(Outcome.finished)
    tracker.wait(lambda: None)
    assert notes.told == [*range(1, 101), Outcome.finished]


@pytest.mark.parametrize("error", [OSError("no network"), SystemExit(3)])
def test_one_that_fails_is_left_out_once_with_the_step_that_it_has(error: BaseException) -> None:
    class Fails(Notes):
        def log(self, record: Any) -> None:
            if record["step"] == 3:
                raise error
            super().log(record)

    fails, said = Fails(), list[str]()
    trackers = Trackers([BackgroundTracker("Notes", lambda: fails, said.append)])
    for step in range(1, 10):
        trackers.log(record(step))
    trackers.finish(Outcome.failed)
    assert fails.told == [1, 2]
    assert len(said) == 1
    assert said[0].startswith(f"Notes failed after step 2 and is left out ({type(error).__name__}")
    assert "metrics.jsonl has all records" in said[0]


def test_one_that_cannot_be_opened_is_left_out() -> None:
    def refuse() -> Notes:
        raise PermissionError("not yours")

    said: list[str] = []
    trackers = Trackers([BackgroundTracker("Notes", refuse, said.append)])
    trackers.log(record(1))
    trackers.finish(Outcome.finished)
    assert len(said) == 1
    assert said[0].startswith("Notes cannot be opened and is left out (PermissionError: not yours)")


def test_one_that_is_no_tracker_is_left_out() -> None:
    said: list[str] = []
    no_tracker: Any = object
    trackers = Trackers([BackgroundTracker("Notes", no_tracker, said.append)])
    trackers.finish(Outcome.finished)
    assert "the tracker object has no method log" in said[0]


def test_one_that_hangs_costs_its_time_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(background.FINISH_SECONDS, Outcome.stopped, 0.2)
    monkeypatch.setattr(background, "CAPACITY", 5)
    goes_on = threading.Event()

    class Hangs(Notes):
        def log(self, record: Any) -> None:
            if record["step"] == 2:
                goes_on.wait(30)
            super().log(record)

    said, beats = list[str](), list[float]()
    trackers = Trackers([BackgroundTracker("Notes", Hangs, said.append)])
    started = time.perf_counter()
    for step in range(1, 101):
        trackers.log(record(step))
        time.sleep(0.002 if step < 5 else 0)
    trackers.finish(Outcome.stopped, lambda: beats.append(time.perf_counter()))
    goes_on.set()
    assert time.perf_counter() - started < 10
    assert beats, "the supervisor is told that the rank is alive"
    note, lost = said
    assert note.startswith("Notes did not close in time and is left alone after it took ")
    assert "more calls wait for it" in note
    assert "took no records for a while" in lost


def test_a_signal_while_it_hangs_at_the_end_shortens_the_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(background.FINISH_SECONDS, Outcome.stopped, 0.2)
    goes_on, abandoned, said = threading.Event(), list[bool](), list[str]()

    class Hangs(Notes):
        def finish(self, outcome: Outcome) -> None:
            goes_on.wait(30)
            raise OSError("it was ended")

        def abandon(self) -> None:
            abandoned.append(True)
            goes_on.set()

    trackers = Trackers([BackgroundTracker("Notes", Hangs, said.append)])
    started = time.perf_counter()
    trackers.finish(Outcome.finished, is_stopped=lambda: time.perf_counter() > started + 0.5)
    assert 0.5 < time.perf_counter() - started < 10
    assert abandoned == [True]
    (note,) = said
    assert note.startswith("Notes did not close in time and is left alone after it took no record")


def test_records_that_find_no_room_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "CAPACITY", 5)
    goes_on, notes, said = threading.Event(), Notes(), list[str]()

    def open_slowly() -> Notes:
        goes_on.wait(30)
        return notes

    trackers = Trackers([BackgroundTracker("Notes", open_slowly, said.append)])
    for step in range(1, 9):
        trackers.log(record(step))
    goes_on.set()
    trackers.finish(Outcome.finished)
    assert notes.told == [1, 2, 3, 4, 5, Outcome.finished]
    (note,) = said
    assert note.startswith("Notes took no records for a while and lacks 3 of them")

"""A tracker that fails is left out."""

from __future__ import annotations

from typing import Any

from llmtune.track.tracker import Outcome, Trackers
from tests.track.records import record


def test_a_failing_tracker_is_left_out_and_the_others_go_on() -> None:
    class Broken:
        def log(self, record: Any) -> None:
            raise OSError("no network")

        def finish(self, outcome: Outcome) -> None:
            raise OSError("no network")

    class Counts:
        seen = 0

        def log(self, record: Any) -> None:
            self.seen += 1

        def finish(self, outcome: Outcome) -> None:
            self.seen += 100
            assert outcome is Outcome.stopped

    counts = Counts()
    said: list[str] = []
    trackers = Trackers([Broken(), counts], said.append)
    trackers.log(record(1))
    trackers.log(record(2))
    trackers.finish(Outcome.stopped)
    assert counts.seen == 102
    assert len(said) == 1
    assert said[0].startswith("the tracker Broken failed and is left out (")


def test_those_that_have_more_to_do_are_waited_for_when_all_have_been_told() -> None:
    told: list[str] = []

    class Slow:
        def __init__(self, name: str):
            self.name = name

        def log(self, record: Any) -> None: ...

        def finish(self, outcome: Outcome) -> None:
            told.append(f"finish {self.name}")

        def wait(self, beat: Any, is_stopped: Any) -> None:
            told.append(f"wait {self.name}")
            beat()

    beats: list[int] = []
    Trackers([Slow("a"), Slow("b")]).finish(Outcome.finished, lambda: beats.append(1))
    assert told == ["finish a", "finish b", "wait a", "wait b"]
    assert len(beats) == 2

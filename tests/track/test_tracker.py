"""A tracker that fails is left out."""

from __future__ import annotations

from typing import Any

from llmtune.track.tracker import Trackers
from tests.track.records import record


def test_a_failing_tracker_is_left_out_and_the_others_go_on() -> None:
    class Broken:
        def log(self, record: Any) -> None:
            raise OSError("no network")

        def finish(self) -> None:
            raise OSError("no network")

    class Counts:
        seen = 0

        def log(self, record: Any) -> None:
            self.seen += 1

        def finish(self) -> None:
            self.seen += 100

    counts = Counts()
    said: list[str] = []
    trackers = Trackers([Broken(), counts], said.append)
    trackers.log(record(1))
    trackers.log(record(2))
    trackers.finish()
    assert counts.seen == 102
    assert len(said) == 1
    assert said[0].startswith("the tracker Broken failed and is left out (")

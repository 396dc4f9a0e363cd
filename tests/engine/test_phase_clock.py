"""Seconds of phases: they add up, nothing waits for a device, and parts count in their phases."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.engine.phases.phase_clock import REST, PhaseClock, StreamTimer

PHASES = ("data", "forward", "backward", "step")


class Steps:
    """A timer whose present moves on as it is told, and whose marks are known up to a time."""

    def __init__(self) -> None:
        self.now = 0
        self.known_to = 10**9

    def mark(self) -> int:
        return self.now

    def seconds(self, begin: int, end: int) -> float | None:
        return float(end - begin) if end <= self.known_to else None


@given(st.lists(st.tuples(st.sampled_from(PHASES), st.integers(0, 9), st.booleans()), max_size=40))
def test_phases_cover_all_time_and_none_is_counted_twice(
    steps: list[tuple[str, int, bool]],
) -> None:
    timer = Steps()
    clock = PhaseClock(timer)
    expected = dict.fromkeys((*PHASES, REST), 0)
    taken: dict[str, float] = {}
    phase = REST
    for name, seconds, takes in steps:
        timer.now += seconds
        expected[phase] += seconds
        clock.enter(name)
        phase = name
        for key, value in clock.take().items() if takes else ():
            taken[key] = taken.get(key, 0.0) + value
    for key, value in clock.take().items():
        taken[key] = taken.get(key, 0.0) + value
    assert taken == {name: seconds for name, seconds in expected.items() if seconds}
    assert sum(clock.totals.values()) == timer.now


def test_what_is_not_known_yet_comes_with_a_later_line() -> None:
    timer = Steps()
    clock = PhaseClock(timer)
    clock.enter("forward")
    timer.now = 3
    clock.enter("backward")
    timer.now, timer.known_to = 8, 5
    clock.enter("step")
    assert clock.take() == {"forward": 3}
    timer.known_to = 8
    assert clock.take() == {"backward": 5}


def test_a_part_counts_in_its_phase_too_and_in_no_other() -> None:
    timer = Steps()
    clock = PhaseClock(timer)
    for phase in ("forward", "evaluate"):
        clock.enter(phase)
        timer.now += 1
        with clock.part("gather", ("forward", "backward")):
            timer.now += 2
    clock.enter("rest")
    assert clock.take() == {"forward": 3, "evaluate": 3, "gather": 2, "gather in forward": 2}


def test_a_streams_events_are_read_only_when_it_has_reached_them() -> None:
    class Event:
        """An event as torch has it: asking for its time before it is reached is an error."""

        def __init__(self, enable_timing: bool):
            assert enable_timing
            self.reached = False
            self.at = 0.0

        def record(self) -> None:
            self.at = time.monotonic()

        def query(self) -> bool:
            return self.reached

        def elapsed_time(self, end: Event) -> float:
            assert self.reached
            assert end.reached
            return 2000.0

    class Accelerator:
        pass

    accelerator: Any = Accelerator()
    accelerator.Event = Event
    timer = StreamTimer(accelerator)
    begin, end = timer.mark(), timer.mark()
    assert timer.seconds(begin, end) is None
    begin.reached = end.reached = True
    assert timer.seconds(begin, end) == pytest.approx(2.0)

"""A sweep that is killed at any moment and started again is the sweep that was not killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtune.sweep.study import Study
from llmtune.sweep.trial import Trial
from tests.sweep.fakes import FakeRunner, make_loop, make_study

TRIALS = 6
_METHODS = ("begin", "judge", "finish", "prune")


class KilledError(BaseException):
    """The process is gone; no handler of an error sees it."""


class Deaths:
    """Counts what happens to a study, before and after each call, and ends the process once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.count = 0
        self.at: int | None = None
        for name in _METHODS:
            monkeypatch.setattr(Study, name, self._around(getattr(Study, name)))

    def _around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def around(*arguments: Any) -> Any:
            self._event()
            found = call(*arguments)
            self._event()
            return found

        return around

    def _event(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise KilledError


def sweep(folder: Path) -> Iterator[Trial]:
    study = make_study(folder)
    make_loop(study, FakeRunner(), TRIALS).run()
    yield from study.list_trials()


def describe(trials: Iterator[Trial]) -> list[tuple[Any, ...]]:
    return [(t.number, t.values, t.state, t.value, t.evaluations) for t in trials]


def test_a_kill_at_any_moment_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths = Deaths(monkeypatch)
    (tmp_path / "whole").mkdir()
    whole = describe(sweep(tmp_path / "whole"))
    events = deaths.count
    assert len(whole) == TRIALS
    assert len({str(values) for _, values, *_ in whole}) == TRIALS
    assert len({state for _, _, state, *_ in whole}) == 2, "finished ones and pruned ones"
    for moment in range(1, events + 1):
        folder = tmp_path / str(moment)
        folder.mkdir()
        deaths.count, deaths.at = 0, moment
        with pytest.raises(KilledError):
            describe(sweep(folder))
        deaths.at = None
        assert describe(sweep(folder)) == whole, f"killed at event {moment} of {events}"

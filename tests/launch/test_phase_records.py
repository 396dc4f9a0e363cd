"""Phase records say which step is done, and a record that no longer changes is a hang."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmtune.engine.phases.heartbeat import PhaseLog
from llmtune.launch.supervise import phase_records
from llmtune.launch.supervise.phase_records import HangDetector, finished_step
from llmtune.storage.rank_files import phase_file


@pytest.mark.parametrize(
    ("phase", "step", "finished"),
    [
        ("load", 0, 0),
        ("evaluate", 0, 0),
        ("forward", 1, 0),
        ("step", 8, 7),
        ("save", 8, 8),
        ("evaluate", 8, 8),
    ],
)
def test_steps_done_are_read_from_the_records(
    phase: str, step: int, finished: int, tmp_path: Path
) -> None:
    log = PhaseLog(phase_file(tmp_path, 1))
    log.step = step
    log.enter(phase)
    assert finished_step(tmp_path, 2) == finished


def test_a_supervisor_that_was_suspended_with_its_ranks_sees_no_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = PhaseLog(phase_file(tmp_path, 0))
    log.enter("forward")
    now = 0.0
    monkeypatch.setattr(phase_records, "time", SimpleNamespace(monotonic=lambda: now))
    watch = HangDetector(tmp_path, 1, 10.0)
    assert not watch.is_hung()
    for seconds in [1.0] * 8 + [86400.0]:
        now += seconds
        assert not watch.is_hung()
    log.beat()
    for _ in range(10):
        now += 1.0
        assert not watch.is_hung()
    now += 1.0
    assert watch.is_hung()


def test_clocks_and_time_stamps_of_files_do_not_matter(tmp_path: Path) -> None:
    log = PhaseLog(phase_file(tmp_path, 0))
    log.enter("forward")
    watch = HangDetector(tmp_path, 1, 0.0)
    assert not HangDetector(tmp_path, 1, 60.0).is_hung()
    watch.is_hung()
    os.utime(phase_file(tmp_path, 0), (0, 0))
    assert watch.is_hung()

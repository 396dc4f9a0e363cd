"""A run that makes no progress is ended, and its stack traces are kept."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmtune.engine.heartbeat import PhaseLog
from llmtune.launch.supervise import phase_records
from llmtune.launch.supervise.outcome import RanksFailedError
from llmtune.launch.supervise.phase_records import HangDetector, finished_step
from llmtune.launch.supervise.supervisor import Limits
from llmtune.storage.rank_files import phase_file, read_phase
from tests.launch.fakes import run_fakes


@pytest.mark.process
def test_one_frozen_rank_is_a_hang_and_the_others_say_where_they_wait(tmp_path: Path) -> None:
    body = """
        reach(4)
        def wait_for_the_other():
            time.sleep(600)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        wait_for_the_other()
    """
    started = time.monotonic()
    with pytest.raises(
        RanksFailedError, match=r"no rank made progress for 0.8 s \(launch.hang_timeout"
    ) as caught:
        run_fakes(body, tmp_path, Limits(hang_timeout=0.8))
    assert time.monotonic() - started < 15
    assert caught.value.step == 3
    (stacks,) = tmp_path.glob("stacks-*.txt")
    assert f"{stacks}, no answer from rank 1" in str(caught.value)
    first, second = stacks.read_text().split("==== rank 1: forward, step 4")
    assert "==== rank 0: forward, step 4" in first
    assert "in wait_for_the_other" in first
    assert "no answer" in second


@pytest.mark.process
def test_long_work_that_beats_is_no_hang(tmp_path: Path) -> None:
    run_fakes(
        """
        import threading
        reach(1, "evaluate")
        def work():
            for _ in range(8):
                time.sleep(0.2)
                phases.beat()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        """,
        tmp_path,
        Limits(hang_timeout=1.0),
    )


@pytest.mark.process
def test_loading_may_take_ten_times_as_long(tmp_path: Path) -> None:
    run_fakes(
        "reach(0, 'load') if rank else None\ntime.sleep(1)", tmp_path, Limits(hang_timeout=0.3)
    )


def test_every_write_changes_the_record(tmp_path: Path) -> None:
    log = PhaseLog(phase_file(tmp_path, 0))
    assert read_phase(tmp_path, 0).phase == "start"
    log.enter("evaluate")
    seen = [phase_file(tmp_path, 0).read_bytes()]
    for write in (log.beat, log.beat, lambda: log.enter("evaluate")):
        write()
        seen.append(phase_file(tmp_path, 0).read_bytes())
    assert len(set(seen)) == 4
    assert {len(record) for record in seen} == {len(seen[0])}
    assert read_phase(tmp_path, 0).phase == "evaluate"
    PhaseLog().beat()


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


@pytest.mark.process
def test_a_rank_that_cannot_answer_yet_is_not_ended_by_the_question(tmp_path: Path) -> None:
    body = """
        reach(1)
        (failures / f"stack-{rank}.txt").unlink()
        signal.signal(signal.SIGUSR2, lambda *_: os._exit(0))
        time.sleep(600)
    """
    with pytest.raises(RanksFailedError, match="no answer from rank 0, 1"):
        run_fakes(body, tmp_path, Limits(hang_timeout=0.3))

"""A run that makes no progress is ended, and its stack traces are kept."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from llmtune.launch.supervise.outcome import RanksFailedError
from llmtune.launch.supervise.supervisor import Limits
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

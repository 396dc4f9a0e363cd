"""Ranks that fail, are killed, or outlive somebody; fakes of a few lines stand in for training."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtune.errors import CheckpointError, DataError, DoesNotFitError, LlmtuneError, StoppedError
from llmtune.launch.processes.parent_death import may_be_launcher
from llmtune.launch.processes.rank_process import RankProcess
from llmtune.launch.supervise.outcome import RanksFailedError
from llmtune.launch.supervise.rank_report import to_user_error
from llmtune.storage.lock import hold_lock
from llmtune.storage.rank_files import FailureReport
from tests.launch.fakes import alive, pid_of, run_fakes, start_supervisor, wait_until
from tests.processes import cold


@pytest.mark.process
def test_ranks_know_each_other() -> None:
    run_fakes("""
        assert os.environ["WORLD_SIZE"] == "2" and os.environ["MASTER_ADDR"] and int(os.environ["MASTER_PORT"])
        assert os.environ["LOCAL_RANK"] == os.environ["RANK"]
    """)  # noqa: E501


@pytest.mark.process
def test_a_failing_rank_ends_the_others_at_once_with_its_message() -> None:
    started = time.monotonic()
    with pytest.raises(DataError, match=r"rows.jsonl:3") as caught:
        run_fakes("""
            if rank == 0:
                time.sleep(600)
            fail(DataError("rows.jsonl:3: bad"))
        """)
    assert caught.value.exit_code == 4
    assert time.monotonic() - started < 30


@pytest.mark.process
def test_an_unexpected_error_points_to_the_log_and_may_be_tried_again() -> None:
    with pytest.raises(
        RanksFailedError, match="rank 1: ZeroDivisionError: no\nMore in train.log"
    ) as caught:
        run_fakes("""
            reach(7)
            if rank == 1:
                fail(ZeroDivisionError("no"))
        """)
    assert caught.value.exit_code == 1
    assert caught.value.reason == "rank 1: ZeroDivisionError: no"
    assert caught.value.step == 6
    assert not caught.value.rollback


@pytest.mark.process
def test_a_killed_rank_is_named_and_not_the_rank_that_lost_it() -> None:
    with pytest.raises(
        RanksFailedError, match="rank 1 ended with signal SIGKILL.*newest checkpoint"
    ) as caught:
        run_fakes("""
            reach(5, "save" if rank else "forward")
            if rank == 1:
                ready()
                os.kill(os.getpid(), signal.SIGKILL)
            while not (out / "1.pid").exists():
                time.sleep(0.001)
            victim = Path("/proc") / (out / "1.pid").read_text() / "stat"
            while " Z " not in victim.read_text():
                time.sleep(0.001)
            fail(RuntimeError("Connection closed by peer"))
        """)
    assert caught.value.step == 5, "a rank that saves step 5 has done it"


@pytest.mark.process
def test_a_rank_can_ask_for_a_rollback() -> None:
    report = {
        "rank": 0,
        "code": 1,
        "message": "loss is nan\nmore",
        "known": True,
        "time": 0,
        "rollback": True,
    }
    with pytest.raises(RanksFailedError, match="loss is nan") as caught:
        run_fakes(f"""
            reach(3)
            if rank == 0:
                (failures / "rank-0.json").write_text({json.dumps(report)!r})
                os._exit(1)
            fail(RuntimeError("Connection closed by peer"))
        """)
    assert caught.value.rollback
    assert caught.value.reason == "loss is nan"


@pytest.mark.process
def test_other_errors_with_advice_are_not_tried_again() -> None:
    with pytest.raises(LlmtuneError, match="no") as caught:
        run_fakes("fail(LlmtuneError('no'))")
    assert type(caught.value) is LlmtuneError


def test_a_report_that_was_cut_off_counts_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "rank-0.json").write_text('{"rank": 0, "co')
    (tmp_path / "rank-1.json").write_text('{"rank": 1, "known": true, "time": 1}')
    assert [report.rank for report in FailureReport.read_all(tmp_path)] == [1]


@pytest.mark.process
def test_ranks_that_stopped_and_saved_are_no_failure() -> None:
    with pytest.raises(StoppedError) as caught:
        run_fakes("sys.exit(75)")
    assert caught.value.exit_code == 75


@pytest.mark.process
def test_no_rank_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    supervisor = start_supervisor("ready()\ntime.sleep(600)", tmp_path)
    assert len(alive(tmp_path)) == 2
    supervisor.kill()
    supervisor.wait()
    assert wait_until(lambda: not alive(tmp_path), 10)


@pytest.mark.process
def test_a_rank_whose_supervisor_died_before_it_looked_does_not_begin() -> None:
    environment = {**os.environ, "RANK": "0"}
    orphan = "import os\nos.environ['LLMTUNE_SUPERVISOR'] = '1'\n"
    body = (
        "from llmtune.launch.processes.parent_death import"
        " die_with_supervisor\ndie_with_supervisor()\nos._exit(42)\n"
    )
    process = RankProcess(0, ["-c", orphan + body], environment)
    assert wait_until(lambda: process.exit_code() is not None)
    assert process.exit_code() == 1
    process.wait()


CHILD = """
    if os.fork() == 0:
        rank = f"child{rank}"
        ready()
        time.sleep(600)
    while not (out / f"child{rank}.pid").exists():
        time.sleep(0.01)
"""


@pytest.mark.process
def test_children_of_ranks_end_with_them_also_where_the_rank_ended_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    run_fakes(CHILD)
    assert pid_of(tmp_path, "child0") != pid_of(tmp_path, "child1")
    assert wait_until(lambda: not alive(tmp_path), 5)


@pytest.mark.process
def test_an_exit_code_can_be_read_again_and_again() -> None:
    process = RankProcess(0, ["-c", "import os; os.kill(os.getpid(), 9)"], dict(os.environ))
    assert wait_until(lambda: process.exit_code() is not None)
    assert process.exit_code() == -signal.SIGKILL
    process.kill()
    process.wait()
    assert process.exit_code() == -signal.SIGKILL
    process.send(signal.SIGTERM)


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    refused = pytest.raises(CheckpointError, match=rf"process {os.getpid()}")
    with hold_lock(tmp_path / ".lock"), refused, hold_lock(tmp_path / ".lock"):
        pass
    with hold_lock(tmp_path / ".lock"):
        pass


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you"
            " tried"
        ),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
    ],
)
def test_memory_that_ran_out_comes_with_advice(error: Exception) -> None:
    known = to_user_error(error)
    assert isinstance(known, DoesNotFitError)
    assert "train.gradient_checkpointing=true" in str(known)
    assert to_user_error(ValueError("x")) is None


@pytest.mark.process
def test_of_ranks_that_fail_at_once_the_one_that_spoke_first_is_named() -> None:
    """Rank 0 loses the connection to rank 1, and both are gone when the supervisor looks."""
    with pytest.raises(RanksFailedError, match="rank 1: ZeroDivisionError: the reason"):
        run_fakes("""
            if rank == 1:
                report_failure(ZeroDivisionError("the reason"), rank, sys.stdout, False)
                (out / "1.said").touch()
            while not (out / "1.said").exists():
                time.sleep(0.001)
            if rank == 0:
                report_failure(RuntimeError("Connection closed by peer"), rank, sys.stdout, False)
                (out / "0.said").touch()
            while not (out / "0.said").exists():
                time.sleep(0.001)
            os._exit(1)
        """)


@pytest.mark.process
def test_a_rank_that_ended_without_a_word_is_not_taken_for_one_that_lost_it() -> None:
    with pytest.raises(RanksFailedError, match="rank 1 ended with exit code 9 and left no message"):
        run_fakes("""
            if rank == 1:
                ready()
                os._exit(9)
            while not (out / "1.pid").exists():
                time.sleep(0.001)
            time.sleep(0.5)
            fail(RuntimeError("Connection closed by peer"))
        """)


@pytest.mark.process
@pytest.mark.parametrize(
    ("parent", "environment", "expected"),
    [
        (sys.executable, {}, True),
        ("/bin/sh", {"LOCAL_RANK": "1"}, True),
        ("/bin/sh", {"NOT_LOCAL_RANK": "1"}, False),
        ("/bin/sleep", {}, False),
    ],
    ids=[
        "a Python program",
        "a script between launcher and rank",
        "another script",
        "what adopts orphans",
    ],
)
def test_what_may_have_started_a_rank(
    parent: str, environment: dict[str, str], expected: bool
) -> None:
    command = {
        sys.executable: [sys.executable, "-S", "-c", "import time; time.sleep(600)"],
        "/bin/sh": ["/bin/sh", "-c", "read line"],
        "/bin/sleep": ["/bin/sleep", "600"],
    }[parent]
    with cold():
        process = subprocess.Popen(
            command, env={"PATH": os.environ["PATH"], **environment}, stdin=subprocess.PIPE
        )
    try:
        time.sleep(0.1)
        assert may_be_launcher(process.pid) is expected
    finally:
        process.kill()
        process.communicate()


def test_a_process_that_nobody_can_look_into_may_be_one_but_for_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "readlink", refuse)
    assert may_be_launcher(os.getpid())
    assert not may_be_launcher(1)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("file", [None, "/tmp/llmtune-x/request.json"])
def test_a_disk_that_takes_nothing_more_is_an_error_with_advice(
    number: int, file: str | None
) -> None:
    known = to_user_error(OSError(number, os.strerror(number), file))
    assert known is not None
    assert (
        known.exit_code,
        os.strerror(number) in str(known),
        (file or "TMPDIR") in str(known),
    ) == (7, True, True)
    assert to_user_error(OSError(errno.EPIPE, "Broken pipe")) is None

"""Memory that ran out is recognized however a rank ended."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from llmtune.engine.phases.heartbeat import PhaseLog
from llmtune.errors import CheckpointError
from llmtune.launch.supervise import out_of_memory
from llmtune.launch.supervise.out_of_memory import count_kills, find_event, memory_pool
from llmtune.storage.rank_files import FailureReport, KernelKills, phase_file

ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"
    " allocate 1 bytes."
)


def test_errors_are_told_apart() -> None:
    assert memory_pool(RuntimeError(ALLOCATOR))
    assert memory_pool(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert memory_pool(MemoryError())
    assert memory_pool(RuntimeError("Connection closed by peer")) is None
    assert (
        memory_pool(CheckpointError("checkpoint-3 was not saved (No space left on device)")) is None
    )


def test_a_rank_that_reported_it_comes_first(tmp_path: Path) -> None:
    log = PhaseLog(phase_file(tmp_path, 1))
    log.step = 7
    log.enter("backward")
    report = FailureReport(
        rank=1,
        code=3,
        message=f"out of memory: {ALLOCATOR}",
        known=True,
        time=1.0,
        out_of_memory="host",
    )
    report.write(tmp_path)
    reports = FailureReport.read_all(tmp_path)
    assert reports == [report]
    event = find_event([1, 3], 1, reports, tmp_path, "")
    assert event is not None
    assert (event.rank, event.phase, event.step, event.pool) == (1, "backward", 7, "host")
    assert event.peak_bytes > 10**7
    assert "in backward of step 7" in event.describe()


@pytest.mark.parametrize(
    ("what", "pool"),
    [
        ("std::bad_alloc", "host"),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", "device"),
        ("HIP out of memory. Tried to allocate 2.00 GiB", "device"),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "device"),
        ("cudaHostAlloc failed: CUDA error: out of memory", "host"),
    ],
)
def test_an_abort_counts_if_the_allocator_said_so(what: str, pool: str, tmp_path: Path) -> None:
    said = f"terminate called after throwing an instance of 'std::exception'\n  what():  {what}\n"
    event = find_event([-signal.SIGABRT, -signal.SIGKILL], 0, [], tmp_path, said)
    assert event is not None
    assert (event.rank, event.phase, event.pool) == (0, "start", pool)
    assert find_event([-signal.SIGABRT], 0, [], tmp_path, "Fatal Python error: Aborted") is None


def test_a_kill_counts_if_it_was_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_kills().write(tmp_path)
    assert find_event([-signal.SIGKILL], 0, [], tmp_path, "") is None, (
        "somebody's kill -9 is no lack of memory"
    )
    more = KernelKills(count_kills().count + 1)
    monkeypatch.setattr(out_of_memory, "count_kills", lambda: more)
    event = find_event([-signal.SIGKILL], 0, [], tmp_path, "")
    assert event is not None
    assert "kernel" in event.message

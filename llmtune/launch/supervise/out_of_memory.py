"""Recognize that memory ran out in a rank, however it ended, and describe it by its records."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from pathlib import Path

from llmtune.errors import DoesNotFitError
from llmtune.launch.supervise.memory_errors import memory_pool_of_text
from llmtune.storage.rank_files import FailureReport, KernelKills, read_phase


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEvent:
    """Memory that ran out, and where."""

    rank: int
    phase: str
    """The rank's phase: one of ``start load answer forward backward step evaluate save``."""
    step: int
    """The optimizer step under way; 0 before the first."""
    peak_bytes: int
    """Peak in the rank's last record: resident on the host, or allocated on the GPU by torch."""
    pool: str
    """``device`` or ``host``."""
    message: str

    def describe(self) -> str:
        """Describe the event in one sentence."""
        where = f"in {self.phase}" + (f" of step {self.step}" if self.step else "")
        return (
            f"out of {self.pool} memory {where} (rank {self.rank}):"
            f" {self.message.splitlines()[0][:200]}"
        )


class RanOutOfMemoryError(DoesNotFitError):
    """A rank ran out of memory."""

    def __init__(self, event: MemoryEvent):
        super().__init__(event.describe())
        self.event = event


def count_kills() -> KernelKills:
    """Ask the kernel how many processes its OOM killer has ended."""
    total = 0
    for path, key in (("/proc/vmstat", "oom_kill"), ("/sys/fs/cgroup/memory.events", "oom_kill")):
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.split()[0] == key)
    return KernelKills(total)


def find_event(
    codes: list[int | None],
    first_failed: int | None,
    reports: list[FailureReport],
    folder: Path,
    output: str,
) -> MemoryEvent | None:
    """Return the event, if memory is what ended the ranks.

    Args:
        codes: Exit codes of the ranks.
        first_failed: The rank that ended first.
        reports: What ranks reported themselves.
        folder: Of the attempt's :mod:`~llmtune.storage.rank_files`.
        output: What the ranks printed.
    """
    for report in reports:
        if report.out_of_memory is not None:
            message = report.message.removeprefix("out of memory: ")
            return _event(folder, report.rank, report.out_of_memory, message)
    if (
        first_failed is not None
        and codes[first_failed] == -signal.SIGKILL
        and count_kills().count > KernelKills.read(folder).count
    ):
        return _event(folder, first_failed, "host", "the kernel ended the process")
    said = next(
        (line for line in output.splitlines() if memory_pool_of_text(line) is not None), None
    )
    for rank, code in enumerate(codes):
        if said is not None and code not in (0, None, -signal.SIGKILL, -signal.SIGTERM):
            return _event(folder, rank, memory_pool_of_text(said) or "host", said.strip())
    return None


def event_at_limit(folder: Path, rank: int, message: str) -> MemoryEvent | None:
    """Return the event that may have ended a rank near its memory limit, whatever it reported."""
    event = _event(folder, rank, "host", message)
    pool = read_phase(folder, rank).at_limit
    return replace(event, pool=pool) if pool else None


def _event(folder: Path, rank: int, pool: str, message: str) -> MemoryEvent:
    record = read_phase(folder, rank)
    peak = record.device_peak_bytes if pool == "device" else record.peak_bytes
    return MemoryEvent(
        rank=rank,
        phase=record.phase,
        step=record.step,
        peak_bytes=peak,
        pool=pool,
        message=message,
    )

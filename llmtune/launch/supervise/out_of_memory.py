"""Memory that ran out in a rank: recognized however the rank ended, and described by what it left
behind.
"""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtune.errors import DoesNotFitError
from llmtune.launch.supervise.memory_errors import memory_pool_of_text


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEvent:
    """What is known of it."""

    rank: int
    phase: str
    """``start``, ``load``, ``answer``, ``forward``, ``backward``, ``step``, ``evaluate`` or
    ``save``.
    """
    step: int
    """The optimizer step under way; 0 before the first."""
    peak_bytes: int
    """Of the rank, when it last noted where it stood: resident, or what torch had allocated on its
    GPU.
    """
    pool: str
    """``device`` or ``host``."""
    message: str

    def describe(self) -> str:
        """One sentence."""
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


def phase_file(folder: Path, rank: int) -> Path:
    """Where a rank notes its phase."""
    return folder / f"phase-{rank}.json"


def read_kills() -> int:
    """Processes that the kernel has ended for want of memory: of this machine, or of this
    container.
    """
    total = 0
    for path, key in (("/proc/vmstat", "oom_kill"), ("/sys/fs/cgroup/memory.events", "oom_kill")):
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.split()[0] == key)
    return total


def find_event(
    codes: list[int | None],
    first_failed: int | None,
    reports: list[dict[str, Any]],
    folder: Path,
    output: str,
) -> MemoryEvent | None:
    """The event, if memory is what ended the ranks.

    Args:
        codes: Exit codes of the ranks.
        first_failed: The rank that ended first.
        reports: What ranks reported themselves.
        folder: Where ranks noted their phases, and the supervisor the number of :func:`read_kills`
            at the start.
        output: What the ranks printed.
    """
    for report in reports:
        if "out_of_memory" in report:
            message = report["message"].removeprefix("out of memory: ")
            return _event(folder, report["rank"], report["out_of_memory"], message)
    if (
        first_failed is not None
        and codes[first_failed] == -signal.SIGKILL
        and _kills_since_start(folder) > 0
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
    """What memory may have had to do with it where a rank ended near its limit, in whatever words;
    None where it did not.
    """
    event = _event(folder, rank, "host", message)
    pool = _record(folder, rank).get("at_limit")
    return replace(event, pool=pool) if pool else None


def note_kills(folder: Path) -> None:
    """Remember the kernel's count, to tell at the end whether it rose."""
    (folder / "kills").write_text(str(read_kills()))


def _kills_since_start(folder: Path) -> int:
    return read_kills() - int((folder / "kills").read_text())


def _event(folder: Path, rank: int, pool: str, message: str) -> MemoryEvent:
    record = _record(folder, rank)
    peak = record["device_peak_bytes"] if pool == "device" else record["peak_bytes"]
    return MemoryEvent(
        rank=rank,
        phase=record["phase"],
        step=record["step"],
        peak_bytes=peak,
        pool=pool,
        message=message,
    )


def _record(folder: Path, rank: int) -> dict[str, Any]:
    """What a rank noted of itself last."""
    empty = {"phase": "start", "step": 0, "peak_bytes": 0, "device_peak_bytes": 0}
    try:
        return {**empty, **json.loads(phase_file(folder, rank).read_text())}
    except (OSError, json.JSONDecodeError):
        return empty

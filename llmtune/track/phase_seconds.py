"""Names of the phases of a run in its records, and the phases as a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llmtune.track.tracker import Record
from llmtune.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from llmtune.plan.plan import Plan

#: Phase of :class:`llmtune.engine.phases.heartbeat.PhaseLog` -> its name in records and for people.
PHASES = {
    "start": "starting the ranks",
    "load": "loading the model",
    "data": "waiting for data",
    "forward": "forward pass",
    "backward": "backward pass",
    "step": "optimizer step",
    "evaluate": "held-out loss",
    "answer": "sample answers",
    "save": "saving",
    "trace": "writing a trace",
    "finish": "waiting for trackers and copies",
    "rest": "everything else",
}

#: Phase -> its key in ``metrics.jsonl``.
KEYS = {
    "data": "data_seconds",
    "forward": "forward_seconds",
    "backward": "backward_seconds",
    "step": "optimizer_seconds",
    "gather": "gather_seconds",
    "evaluate": "evaluate_seconds",
    "save": "save_seconds",
}


def to_record(seconds: Mapping[str, float]) -> Record:
    """Return the seconds since the last line by their keys in ``metrics.jsonl``."""
    return {key: seconds[phase] for phase, key in KEYS.items() if phase in seconds}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A number as it was planned, and as it happened."""

    planned: float
    measured: float

    @property
    def ratio(self) -> float:
        """Return measured / planned."""
        return self.measured / self.planned if self.planned else float("nan")

    def to_dict(self) -> dict[str, float]:
        """Return the numbers with their ratio."""
        return {**asdict(self), "ratio": self.ratio}


def compare_speed(plan: Plan, records: Sequence[Record]) -> Comparison | None:
    """Compare tokens per second: the plan's, for full rows, and the median of the steps.

    Returns:
        None where no step was recorded. The first step of several is left out.
    """
    speeds = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    if not speeds:
        return None
    measured = statistics.median(speeds[1:] or speeds)
    return Comparison(planned=plan.tokens_per_second, measured=measured)


def compare_memory(plan: Plan, records: Sequence[Record]) -> Comparison | None:
    """Compare bytes of rank 0: the planned peak, and the largest that a step recorded."""
    used = [record["memory_bytes"] for record in records if "memory_bytes" in record]
    if not used:
        return None
    planned = plan.memory.device.total
    if plan.hardware.accelerator == "cpu":
        planned += plan.memory.host.total
    return Comparison(planned=planned, measured=max(used))


def describe_seconds(seconds: Mapping[str, float]) -> dict[str, str]:
    """Describe the seconds of each phase and its share of all, longest first."""
    whole = sum(seconds.get(phase, 0.0) for phase in PHASES)
    shown = {phase: seconds[phase] for phase in PHASES if seconds.get(phase, 0.0) >= whole / 1000}
    rows: dict[str, str] = {}
    for phase in sorted(shown, key=lambda phase: -shown[phase]):
        rows[PHASES[phase]] = _describe(shown[phase], whole)
    if seconds.get("gather"):
        rows["weights gathered in both passes"] = _describe(seconds["gather"], whole)
    return rows


def _describe(seconds: float, whole: float) -> str:
    shown = format_seconds(seconds) if seconds >= 60 else f"{seconds:.1f} s"
    return f"{shown:>8}  {100 * seconds / whole:5.1f} %"


def describe_comparisons(speed: Comparison | None, memory: Comparison | None) -> dict[str, str]:
    """Describe what was planned and what happened."""
    rows: dict[str, Any] = {}
    if speed is not None:
        rows["speed"] = (
            f"{speed.measured:,.0f} tokens/s (median), planned {speed.planned:,.0f} for full rows:"
            f" {speed.ratio:.2f} of it"
        )
    if memory is not None:
        rows["memory"] = (
            f"{format_bytes(memory.measured)} at most, planned {format_bytes(memory.planned)}:"
            f" {memory.ratio:.2f} of it"
        )
    return rows

"""Build the ladder of placements, and choose the fastest candidate that fits.

Candidates are all placements, micro-batch sizes and numbers of recomputed layers at the user's
global batch size.

:mod:`llmtune.plan.search` evaluates them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from llmtune.config.schema import Config
from llmtune.plan.batch_sizes import BatchPlan, StepRows
from llmtune.plan.devices.hardware import Hardware
from llmtune.plan.length.batch_schedule import BatchSchedule
from llmtune.plan.memory.memory_plan import MemoryPlan
from llmtune.plan.memory.placement import RUNGS, Placement
from llmtune.plan.memory.recomputed_layers import RecomputedLayers
from llmtune.plan.memory.shapes import ModelShape
from llmtune.plan.memory.zero_buffers import ZeroSizes
from llmtune.plan.speed import Cluster, SpeedPlan

#: Candidates as fast as this share of the fastest count as equal; the simplest of them is taken.
EQUAL_SPEED = 0.985

#: Share of the failed candidate's planned bytes that the next candidate may need: of the peak
#: (False), and of the persistent part alone (True). Every attempt costs a start, so that states
#: which differ by a buffer are not tried.
CLEARLY_LESS = {False: 0.95, True: 0.8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to run the job."""

    placement: Placement
    batch: BatchPlan
    """The batch of the first step, where ``train.batch_schedule`` lets it grow."""
    recomputed: RecomputedLayers
    sizes: ZeroSizes
    memory: MemoryPlan
    speed: SpeedPlan
    """The mean over the run's steps, where they grow."""
    speed_by_rows: dict[int, SpeedPlan]
    """That of a step of each size of the schedule."""
    lacks: str | None
    """None where it fits, or which memory is too small."""

    @property
    def fits(self) -> bool:
        """Tell whether it stays within the usable share of every memory."""
        return self.lacks is None

    @property
    def key(self) -> dict[str, Any]:
        """Return what tells it from the other candidates of a job, as plain values."""
        return candidate_key(self.placement, self.batch, self.recomputed)

    def describe(self) -> str:
        """Describe the candidate in one phrase, for messages."""
        return (
            f"{self.placement.describe()}; micro-batch {self.batch.micro_batch_size}, checkpointing"
            f" {self.recomputed.describe()}"
        )


@dataclass(frozen=True, slots=True)
class Rung:
    """A placement with its best candidate."""

    name: str
    candidate: Candidate | None
    """The fastest that fits, or the smallest if none does; None if the rung is not possible."""
    reason: str
    """Reason why it was chosen, or why it lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """All candidates of a job, and what was chosen."""

    hardware: Hardware
    shape: ModelShape
    world_size: int
    rows: StepRows
    schedule: BatchSchedule
    candidates: tuple[Candidate, ...]
    """Candidates of all rungs that are possible and allowed."""
    rungs: tuple[Rung, ...]
    chosen: Candidate | None
    attn_implementation: str
    activations_origin: str
    plan_again: Callable[[Config, Hardware], Ladder]
    """Evaluates the same job with a changed config on other hardware."""
    refusals: tuple[str, ...] = ()
    """Reasons why a job that is only planned could not be trained here."""
    notes: tuple[str, ...] = ()
    """Lines about hardware and model for the page before step 1."""

    @property
    def cluster(self) -> Cluster:
        """Return the machines and their ranks."""
        return Cluster(self.hardware, self.world_size)


def candidate_key(
    placement: Placement, batch: BatchPlan, recomputed: RecomputedLayers
) -> dict[str, Any]:
    """Return what tells a candidate from the others of its job, as plain values.

    Where all layers are the same, and each rank has rows of its own, the values are those that
    earlier versions wrote, so that what they remember of memory that ran out still counts.
    """
    key = {
        **asdict(placement),
        "micro_batch_size": batch.micro_batch_size,
        "gradient_checkpointing": recomputed.count > 0,
    }
    if recomputed.is_partial:
        key["recomputed_layers"] = recomputed.count
    if batch.sequence_parallel_size > 1:
        key["sequence_parallel_size"] = batch.sequence_parallel_size
    return key


def failure_conditions(
    hardware: Hardware, world_size: int, memory_limit: str | None
) -> dict[str, Any]:
    """Return the conditions under which memory that ran out counts for a later start.

    Args:
        memory_limit: ``launch.memory_limit``.
    """
    return {
        "world_size": world_size,
        "device_memory_bytes": _roughly(hardware.device_memory_bytes),
        "host_memory_bytes": _roughly(hardware.host_memory_bytes),
        "memory_limit": memory_limit,
    }


def _roughly(nbytes: int) -> int:
    """Round to two digits: machines of one kind differ by some kilobytes."""
    return int(float(f"{nbytes:.1e}"))


def choose(candidates: list[Candidate]) -> Candidate | None:
    """Choose the fastest candidate that fits.

    Among equally fast ones it is the one that offloads and partitions least, and then the one that
    needs least memory.
    """
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        return None
    best = max(candidate.speed.tokens_per_second for candidate in fitting)
    equal = [
        candidate
        for candidate in fitting
        if candidate.speed.tokens_per_second >= EQUAL_SPEED * best
    ]
    return min(equal, key=_simplicity)


def next_candidate(
    ladder: Ladder, failed: Candidate, tried: list[Candidate], phase: str, pool: str
) -> Candidate | None:
    """Choose the next candidate after memory ran out although the plan said that it fits.

    It is the fastest that needs clearly less of that memory.

    Args:
        phase: Where it happened. In ``load``, ``step``, ``save`` and ``answer`` only the persistent
            part counts, and a smaller micro-batch does not help.
        pool: ``device`` or ``host``.
    """
    only_persistent = phase in ("load", "step", "save", "answer")
    if ladder.hardware.accelerator == "cpu":
        # Device and host are one memory.
        pool = "both"
    limit = CLEARLY_LESS[only_persistent] * _needed(failed, pool, only_persistent)
    smaller = [
        candidate
        for candidate in ladder.candidates
        if candidate.fits
        and candidate not in tried
        and _needed(candidate, pool, only_persistent) < limit
    ]
    return choose(smaller)


def _needed(candidate: Candidate, pool: str, only_persistent: bool) -> int:
    """Return the planned bytes of one rank in a memory (``device``, ``host`` or ``both``)."""
    device = candidate.memory.device
    on_device = device.persistent if only_persistent else device.total
    on_host = candidate.memory.host.total
    if pool == "both":
        return on_device + on_host
    return on_device if pool == "device" else on_host


def _simplicity(candidate: Candidate) -> tuple[int, int, int, int]:
    order = list(RUNGS).index(candidate.placement.rung)
    total = candidate.memory.device.total
    return order, candidate.placement.zero_stage, candidate.recomputed.count, total

"""The ladder: all placements, micro-batch sizes and activation checkpointing at the user's global
batch size, and the choice of the fastest that fits.

Rungs never change what is computed: precision of states, optimizer and row length are the user's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from llmtune.config.cache_folder import find_cache
from llmtune.config.groups.train import TrainConfig
from llmtune.config.schema import Config, Precision
from llmtune.plan.batch_schedule import BatchSchedule
from llmtune.plan.batch_sizes import BatchPlan, StepRows, batch_options, resolve_batch
from llmtune.plan.deepspeed_overrides import resize
from llmtune.plan.devices.hardware import Hardware
from llmtune.plan.memory.activations import ActivationModel, TraceSettings
from llmtune.plan.memory.model_shape import ModelShape
from llmtune.plan.memory.peak_memory import MemoryPlan, Workload, estimate_memory, find_shortfall
from llmtune.plan.memory.placement import (
    RUNGS,
    Placement,
    make_placement,
    named_rung,
)
from llmtune.plan.memory.rank_bytes import element_bytes
from llmtune.plan.memory.zero_buffers import ZeroSizes, resolve_zero_sizes
from llmtune.plan.memory.zero_states import state_bytes
from llmtune.plan.speed import Cluster, SpeedPlan, average_speed, estimate_speed
from llmtune.tuner.tuner import TUNERS

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
    """Of the first step, where ``train.batch_schedule`` lets it grow."""
    gradient_checkpointing: bool
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
        """Whether it stays within the usable share of every memory."""
        return self.lacks is None

    def describe(self) -> str:
        """One phrase for messages."""
        checkpointing = "on" if self.gradient_checkpointing else "off"
        return (
            f"{self.placement.describe()}; micro-batch {self.batch.micro_batch_size}, checkpointing"
            f" {checkpointing}"
        )


@dataclass(frozen=True, slots=True)
class Rung:
    """A placement with its best candidate."""

    name: str
    candidate: Candidate | None
    """The fastest that fits, or the smallest if none does; None if the rung is not possible."""
    reason: str
    """Why it was chosen, or why it lost."""


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
    refusals: tuple[str, ...] = ()
    """Why a job that is only planned could not be trained here."""

    @property
    def cluster(self) -> Cluster:
        """The machines and their ranks."""
        return Cluster(self.hardware, self.world_size)


def build_ladder(
    config: Config,
    hardware: Hardware,
    shape: ModelShape,
    world_size: int,
    attn_implementation: str,
    begun: TrainConfig | None = None,
) -> Ladder:
    """Evaluate every rung and choose.

    Args:
        begun: The settings that the run was started with, where it is resumed.

    Raises:
        ConfigError: The batch arithmetic is impossible.
    """
    search = Search(
        config=config,
        hardware=hardware,
        shape=shape,
        world_size=world_size,
        attn_implementation=attn_implementation,
        begun=begun,
    )
    asked = named_rung(config.offload)
    by_rung: dict[str, list[Candidate]] = {}
    blocked: dict[str, str] = {}
    for rung in RUNGS:
        reason = _blocked(rung, config, hardware)
        by_rung[rung] = []
        if reason is None:
            by_rung[rung] = list(search.candidates(rung))
        if not by_rung[rung]:
            blocked[rung] = reason or f"needs ZeRO 3, and zero.stage is {config.zero.stage}"

    allowed: list[Candidate] = []
    for rung, candidates in by_rung.items():
        if asked in (None, rung):
            allowed += candidates
    chosen = choose(allowed)
    rungs = tuple(_rung(name, by_rung[name], blocked.get(name), chosen, asked) for name in RUNGS)
    rows = resolve_batch(config.train, world_size, begun)
    return Ladder(
        hardware=hardware,
        shape=shape,
        world_size=world_size,
        rows=rows,
        schedule=BatchSchedule.from_config(config.train, rows.global_batch_size),
        candidates=tuple(allowed),
        rungs=rungs,
        chosen=chosen,
        attn_implementation=attn_implementation,
        activations_origin=search.origin,
    )


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
    """Planned bytes of one rank in a memory (``device``, ``host`` or ``both``)."""
    device = candidate.memory.device
    on_device = device.persistent if only_persistent else device.total
    on_host = candidate.memory.host.total
    if pool == "both":
        return on_device + on_host
    return on_device if pool == "device" else on_host


def _simplicity(candidate: Candidate) -> tuple[int, int, bool, int]:
    order = list(RUNGS).index(candidate.placement.rung)
    total = candidate.memory.device.total
    return order, candidate.placement.zero_stage, candidate.gradient_checkpointing, total


def _rung(
    name: str,
    candidates: list[Candidate],
    blocked: str | None,
    chosen: Candidate | None,
    asked: str | None,
) -> Rung:
    if blocked:
        return Rung(name, None, blocked)
    best = choose(candidates)
    if chosen is not None and chosen.placement.rung == name:
        why = f"offload={name}" if asked == name else "the fastest that fits"
        return Rung(name, chosen, f"chosen: {why}")
    if best is None:
        smallest = min(candidates, key=lambda c: (c.memory.device.total, c.memory.host.total))
        return Rung(name, smallest, f"does not fit; {smallest.lacks}")
    if asked is not None:
        return Rung(name, best, f"fits; offload={asked} was asked for")
    assert chosen is not None
    return Rung(name, best, f"slower: bound by {best.speed.bound_by}")


def _blocked(rung: str, config: Config, hardware: Hardware) -> str | None:
    """Say why a rung is not possible, whatever the memory; None where it is."""
    option = RUNGS[rung]
    if rung != "none" and config.precision is Precision.fp16:
        return "offload is not supported with precision=fp16"
    tuner = TUNERS.find(config.tuner.kind)
    if option.for_large_optimizers and not tuner.trains_all:
        return "pointless: the optimizer of what is trained is small"
    if option.uses_nvme and not hardware.nvme_bytes:
        return "no NVMe: set offload.nvme_path=/path, or hardware.nvme_bytes=4TB to plan with it"
    if rung != "none" and tuner.is_quantized:
        return "weights in 4 bits are not offloaded"
    return None


class Search:
    """Evaluate candidates; what they share is computed once."""

    def __init__(
        self,
        config: Config,
        hardware: Hardware,
        shape: ModelShape,
        world_size: int,
        attn_implementation: str,
        begun: TrainConfig | None = None,
    ):
        self.config = config
        self.tuner = TUNERS.find(config.tuner.kind)
        self.shape = shape
        self.cluster = Cluster(hardware, world_size)
        self.attn_implementation = attn_implementation
        self.trace = ActivationModel(config.model, config.tuner, shape, find_cache(config.paths))
        length = config.data.max_seq_length
        self.batches = batch_options(config.train, world_size, length, hardware.accelerator, begun)
        rows = self.batches[0].global_batch_size
        self.schedule = BatchSchedule.from_config(config.train, rows)
        self.origin = "traced"

    def candidates(self, rung: str) -> Iterator[Candidate]:
        """Evaluate every stage, micro-batch and checkpointing that the config leaves open."""
        asked = self.config.zero.stage
        stages = [stage for stage in RUNGS[rung].stages if asked in ("auto", stage)]
        setting = self.config.train.gradient_checkpointing
        checkpointing = [setting] if isinstance(setting, bool) else [False, True]
        for stage, batch, recompute in product(stages, self.batches, checkpointing):
            placement = make_placement(stage, rung, self.tuner.trains_all)
            yield self.evaluate(placement, batch, recompute)

    def evaluate(self, placement: Placement, batch: BatchPlan, recompute: bool) -> Candidate:
        """Estimate memory and speed of one candidate."""
        config, shape, world = self.config, self.shape, self.cluster.world_size
        hardware, length = self.cluster.hardware, config.data.max_seq_length
        sizes = resize(
            resolve_zero_sizes(shape, placement, world, hardware.accelerator), config.zero.deepspeed
        )
        # What accumulates gradients on the host takes no more of it for more micro-batches, but
        # takes none for one.
        most = batch.resized(self.schedule.largest).accumulation_steps
        states = state_bytes(shape, placement, sizes, config.precision, world, most)
        settings = TraceSettings(
            rows=batch.micro_batch_size,
            length=length,
            gradient_checkpointing=recompute,
            attn_implementation=self.attn_implementation,
            precision=config.precision,
            zero3=placement.zero_stage == 3,
            masked=config.data.packing,
        )
        activations = self.trace(settings)
        self.origin = activations.origin
        memory = estimate_memory(
            shape,
            placement,
            sizes,
            states,
            config.precision,
            world,
            Workload(activations, self._eval_logits(batch), hardware.accelerator),
        )
        lacks = find_shortfall(memory, hardware, self.cluster.ranks_on_node)
        speeds = {
            rows: estimate_speed(
                shape,
                placement,
                batch.resized(rows),
                length,
                recompute,
                config.precision,
                self.cluster,
            )
            for _, rows in self.schedule.entries
        }
        steps = self.schedule.steps_by_rows(config.train.max_steps, length)
        return Candidate(
            placement=placement,
            batch=batch,
            gradient_checkpointing=recompute,
            sizes=sizes,
            memory=memory,
            speed=average_speed([(speeds[rows], count) for rows, count in steps]),
            speed_by_rows=speeds,
            lacks=lacks,
        )

    def _eval_logits(self, batch: BatchPlan) -> int:
        """Bytes of an evaluation batch's logits, their fp32 copy and the log-probabilities."""
        if self.config.data.val_set_size == 0 and self.config.data.eval is None:
            return 0
        rows = self.config.train.per_device_eval_batch_size
        count = rows if isinstance(rows, int) else batch.micro_batch_size
        size = element_bytes(self.config.precision) + 8
        return count * self.config.data.max_seq_length * self.shape.vocab_size * size

"""Search the rungs of a job: evaluate all placements, micro-batches and recomputed layers.

Rungs never change what is computed: precision of states, optimizer and row length are the user's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

from llmtune.config.cache_folder import find_cache
from llmtune.config.groups.train import TrainConfig
from llmtune.config.groups.zero import OffloadConfig, OffloadDevice
from llmtune.config.schema import Config, Precision
from llmtune.optimizer.optimizer import find_optimizer
from llmtune.plan.abilities import NEVER, ONE_BY_ONE
from llmtune.plan.batch_sizes import BatchPlan, Ranks, batch_options, resolve_batch
from llmtune.plan.deepspeed_overrides import resize
from llmtune.plan.devices.hardware import Hardware
from llmtune.plan.ladder import Candidate, Ladder, Rung, choose
from llmtune.plan.length.batch_schedule import BatchSchedule
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.plan.memory.parameter_groups import assign_groups
from llmtune.plan.memory.peak_memory import Workload, estimate_memory, find_shortfall
from llmtune.plan.memory.placement import RUNGS, Placement, find_rung, make_placement
from llmtune.plan.memory.rank_bytes import Arithmetic, StateBytes
from llmtune.plan.memory.recomputed_layers import RecomputedLayers
from llmtune.plan.memory.shapes import ModelShape
from llmtune.plan.memory.trace.activations import ActivationModel
from llmtune.plan.memory.trace.exchange_bytes import exchange_bytes
from llmtune.plan.memory.trace.fake_run import TraceSettings
from llmtune.plan.memory.trace.loss_bytes import head_loss_bytes
from llmtune.plan.memory.zero_buffers import ZeroSizes, resolve_zero_sizes
from llmtune.plan.memory.zero_states import state_bytes
from llmtune.plan.param_groups import fit_optimizer, groups_of_shape
from llmtune.plan.speed import Cluster, SpeedPlan, average_speed, estimate_speed
from llmtune.tuner.tuner import TUNERS


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

    # Candidates of every rung, or why there are none.
    asked = _named_rung(config.offload)
    by_rung: dict[str, list[Candidate]] = {}
    blocked: dict[str, str] = {}
    for rung in RUNGS:
        reason = _blocked(rung, config, hardware)
        by_rung[rung] = []
        if reason is None:
            by_rung[rung] = list(search.candidates(rung))
        if not by_rung[rung]:
            blocked[rung] = reason or _no_stage(rung, config)

    # The fastest of those that the user left open.
    allowed: list[Candidate] = []
    for rung, candidates in by_rung.items():
        if asked in (None, rung):
            allowed += candidates
    chosen = choose(allowed)
    rungs = tuple(_rung(name, by_rung[name], blocked.get(name), chosen, asked) for name in RUNGS)
    rows = resolve_batch(config.train, search.ranks, begun)
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
        plan_again=partial(_plan_again, shape, world_size, hardware.nodes, attn_implementation),
    )


def _plan_again(
    shape: ModelShape,
    world_size: int,
    nodes: int,
    attn_implementation: str,
    config: Config,
    hardware: Hardware,
) -> Ladder:
    """Evaluate a job of so many ranks and nodes for changed config or hardware."""
    world_size = world_size * hardware.nodes // nodes
    groups = Ranks(world_size, config.launch.sequence_parallel_size).groups
    rows = config.train.global_batch_size
    if isinstance(rows, int) and rows % groups:
        # More ranks than before: rows rounded up to a multiple of them.
        rounded_up = math.ceil(rows / groups) * groups
        config = replace(config, train=replace(config.train, global_batch_size=rounded_up))
    if config.train.batch_schedule is not None:
        grown = [
            [start, math.ceil(size / groups) * groups]
            for start, size in config.train.batch_schedule
        ]
        config = replace(config, train=replace(config.train, batch_schedule=grown))
    if not TUNERS.find(config.tuner.kind).trains_all:
        shape = resolve_shape(config.model, config.tuner)
    return build_ladder(config, hardware, shape, world_size, attn_implementation)


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


def _no_stage(rung: str, config: Config) -> str:
    """Say why none of the stages of a rung is possible."""
    stage = config.zero.stage
    stages = [one for one in RUNGS[rung].stages if stage in ("auto", one)]
    if not stages:
        return f"needs ZeRO {RUNGS[rung].stages[0]}, and zero.stage is {stage}"
    device = RUNGS[rung].optimizer
    obstacle = find_optimizer(config.optim).find_obstacle(stages[-1], device)
    assert obstacle is not None
    return obstacle


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
    if option.param == "nvme" and tuner.is_quantized:
        return "weights in 4 bits are not kept on NVMe: a rank's slice of them fits the host"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A placement and a micro-batch, with what a rank holds for them between two steps."""

    placement: Placement
    batch: BatchPlan
    sizes: ZeroSizes
    states: StateBytes


def search_layers(
    evaluate: Callable[[int], Candidate], total: int, one_by_one: bool
) -> Iterator[Candidate]:
    """Evaluate numbers of recomputed layers, among them the smallest that fits.

    Each recomputed layer takes memory away and adds time, so that the smallest number that fits is
    the fastest. Where memory runs out all the same, the ladder goes on with one of the others:
    they divide what is left in four.

    Args:
        total: The largest number.
        one_by_one: Layers need not all be the same.
    """
    none = evaluate(0)
    yield none
    if total == 0:
        return
    every = evaluate(total)
    yield every
    if not one_by_one:
        return
    least, found = 0, {0: none, total: every}
    if not none.fits and every.fits:
        too_few, least = 0, total
        while least - too_few > 1:
            middle = (too_few + least) // 2
            found[middle] = evaluate(middle)
            too_few, least = (too_few, middle) if found[middle].fits else (middle, least)
    wanted = {least, *(least + (total - least) * part // 4 for part in (1, 2, 3))}
    for count in sorted(wanted - {0, total}):
        yield found.get(count) or evaluate(count)


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
        optimizer = fit_optimizer(find_optimizer(config.optim), shape)
        self.arithmetic = Arithmetic(config.precision, optimizer)
        self.shape = assign_groups(shape, groups_of_shape(config.optim, config.tuner, shape))
        self.cluster = Cluster(hardware, world_size)
        self.attn_implementation = attn_implementation
        self.trace = ActivationModel(config.model, config.tuner, shape, find_cache(config.paths))
        length = config.data.max_seq_length
        self.ranks = Ranks(world_size, config.launch.sequence_parallel_size)
        self.batches = batch_options(config.train, self.ranks, length, hardware.accelerator, begun)
        rows = self.batches[0].global_batch_size
        self.schedule = BatchSchedule.from_config(config.train, rows)
        self.origin = "traced"

    def candidates(self, rung: str) -> Iterator[Candidate]:
        """Evaluate every stage, micro-batch and recomputation that the config leaves open."""
        asked = self.config.zero.stage
        stages = [stage for stage in RUNGS[rung].stages if asked in ("auto", stage)]
        for stage, batch in product(stages, self.batches):
            placement = make_placement(stage, rung, self.tuner.trains_all)
            if self.arithmetic.optimizer.find_obstacle(stage, placement.optimizer):
                continue
            evaluate = partial(self.evaluate, self.hold(placement, batch))
            total = self.shape.reached_layers
            setting = self.config.train.gradient_checkpointing
            if isinstance(setting, str):
                one_by_one = self.shape.recomputing == ONE_BY_ONE
                top = 0 if self.shape.recomputing == NEVER else total
                yield from search_layers(evaluate, top, one_by_one)
            else:
                asked_for = total if setting is True else min(int(setting), total)
                yield evaluate(asked_for)

    def hold(self, placement: Placement, batch: BatchPlan) -> Held:
        """Count what a placement and a micro-batch hold, however many layers are recomputed."""
        shape, world = self.shape, self.cluster.world_size
        hardware, optimizer = self.cluster.hardware, self.arithmetic.optimizer
        sizes = resize(
            resolve_zero_sizes(shape, placement, optimizer, world, hardware.accelerator),
            self.config.zero.deepspeed,
        )
        if self.ranks.sequence_parallel_size > 1 and placement.zero_stage < 3:
            # Reductions would run beside the exchange of tokens, in another group of ranks, in an
            # order that was not tried on GPUs.
            sizes = replace(sizes, overlaps=False)
        # What accumulates gradients on the host takes no more of it for more micro-batches, but
        # takes none for one.
        most = batch.resized(self.schedule.largest).accumulation_steps
        states = state_bytes(shape, placement, sizes, self.arithmetic, world, most)
        return Held(placement=placement, batch=batch, sizes=sizes, states=states)

    def evaluate(self, held: Held, layers: int) -> Candidate:
        """Estimate memory and speed of one candidate.

        Args:
            layers: The number of layers that are recomputed.
        """
        config, shape, world = self.config, self.shape, self.cluster.world_size
        hardware, length = self.cluster.hardware, config.data.max_seq_length
        placement, batch, sizes = held.placement, held.batch, held.sizes
        recomputed = RecomputedLayers(layers, shape.reached_layers)
        settings = TraceSettings(
            rows=batch.micro_batch_size,
            length=math.ceil(length / self.ranks.sequence_parallel_size),
            gradient_checkpointing=layers > 0,
            attn_implementation=self.attn_implementation,
            precision=config.precision,
            zero3=placement.zero_stage == 3,
            masked=config.data.packing or shape.bidirectional,
            bidirectional=shape.bidirectional,
            accelerator=hardware.accelerator,
        )
        activations = self.trace.of_layers(settings, recomputed)
        self.origin = activations.origin
        exchanged = exchange_bytes(
            shape,
            batch.rank_tokens(length),
            batch.sequence_parallel_size,
            self.arithmetic.element_bytes,
            recomputed,
        )
        memory = estimate_memory(
            shape,
            placement,
            sizes,
            held.states,
            self.arithmetic,
            world,
            Workload(activations.plus(exchanged), self._eval_logits(batch), hardware.accelerator),
        )

        # What is too small, and how fast it is.
        lacks = find_shortfall(memory, hardware, self.cluster.ranks_on_node)
        speeds = self._speeds(placement, batch, recomputed)
        steps = self.schedule.steps_by_rows(config.train.max_steps, length)
        return Candidate(
            placement=placement,
            batch=batch,
            recomputed=recomputed,
            sizes=sizes,
            memory=memory,
            speed=average_speed([(speeds[rows], count) for rows, count in steps]),
            speed_by_rows=speeds,
            lacks=lacks,
        )

    def _speeds(
        self, placement: Placement, batch: BatchPlan, recomputed: RecomputedLayers
    ) -> dict[int, SpeedPlan]:
        """Predict the speed of a step of each size of the schedule, by its rows."""
        return {
            rows: estimate_speed(
                self.shape,
                placement,
                batch.resized(rows),
                self.config.data.max_seq_length,
                recomputed.share,
                self.arithmetic,
                self.cluster,
            )
            for _, rows in self.schedule.entries
        }

    def _eval_logits(self, batch: BatchPlan) -> int:
        """Return the bytes of an evaluation's loss.

        Where logits are taken these are they, their fp32 copy and the log-probabilities.
        """
        if self.config.data.val_set_size == 0 and self.config.data.eval is None:
            return 0
        rows = self.config.train.per_device_eval_batch_size
        count = rows if isinstance(rows, int) else batch.micro_batch_size
        tokens = replace(batch, micro_batch_size=count).rank_tokens(self.config.data.max_seq_length)
        judged = count if self.shape.judges_rows else tokens
        if self.shape.loss_in_head:
            accelerator = self.cluster.hardware.accelerator
            return head_loss_bytes(
                judged, self.shape, self.config.precision, accelerator, trains=False
            )
        size = self.arithmetic.element_bytes + 8
        return judged * self.shape.outputs * size


def _named_rung(offload: OffloadConfig) -> str | None:
    """Return the rung that the config names; None for ``auto``."""
    if offload.optimizer is OffloadDevice.auto:
        return None
    return find_rung(offload.optimizer.value, offload.param.value)

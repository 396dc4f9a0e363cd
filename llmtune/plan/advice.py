"""Find changes that only the user may make.

These are changes of the arithmetic with the memory they save, and the smallest one under which a
job fits that does not fit as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from llmtune.config.groups.optim import OptimConfig
from llmtune.config.groups.zero import OffloadConfig
from llmtune.config.schema import Config, Precision
from llmtune.errors import ConfigError, DoesNotFitError
from llmtune.optimizer.optimizer import FP32_BYTES, OPTIMIZERS, Optimizer, find_optimizer
from llmtune.plan.devices.hardware import Hardware
from llmtune.plan.ladder import Candidate, Ladder
from llmtune.plan.length.sequence_parallel import check_sequence_parallel
from llmtune.plan.memory.peak_memory import USABLE_SHARE
from llmtune.plan.memory.placement import Placement
from llmtune.plan.memory.rank_bytes import element_bytes
from llmtune.plan.memory.shapes import ModelShape
from llmtune.plan.param_groups import fit_optimizer
from llmtune.tuner.tuner import TUNERS
from llmtune.units import counted, format_bytes, format_count


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One change that alters what is computed."""

    change: str
    saves_bytes: int
    """Bytes saved on one rank's accelerator, or in its host memory if the optimizer is there."""
    where: str
    override: str | None
    """The override to add to the command; None if llmtune has no such option."""


def list_advice(config: Config, ladder: Ladder) -> list[Advice]:
    """List changes of the arithmetic, for the chosen candidate or the first rung's smallest."""
    candidate = ladder.chosen or next(
        (rung.candidate for rung in ladder.rungs if rung.candidate), None
    )
    if candidate is None:
        return []
    advice = list(_state_advice(config, ladder, candidate.placement))
    device = candidate.memory.device
    length = config.data.max_seq_length
    by_length = device.activations + device.logits + device.working_set
    if length > 1024 and candidate.batch.micro_batch_size == 1:
        advice.append(
            Advice(
                change="rows half as long",
                saves_bytes=by_length // 2,
                where="accelerator",
                override=f"data.max_seq_length={length // 2}",
            )
        )
    return sorted(advice, key=lambda item: -item.saves_bytes)


def _state_advice(config: Config, ladder: Ladder, placement: Placement) -> Iterator[Advice]:
    shape = ladder.shape
    trained = shape.trainable_parameters // (ladder.world_size if placement.zero_stage else 1)
    where = {"none": "accelerator", "cpu": "host", "nvme": "NVMe"}[placement.optimizer]
    optimizer = fit_optimizer(find_optimizer(config.optim), shape)
    master_and_states = int(optimizer.master_and_state_bytes * trained)
    if master_and_states < 10**9:
        return
    if TUNERS.find(config.tuner.kind).trains_all:
        lora = int(shape.trainable_parameters * optimizer.master_and_state_bytes)
        yield Advice(
            change="train adapters only",
            saves_bytes=lora // ladder.world_size,
            where=where,
            override="tuner=lora",
        )
    held = _held_bytes(optimizer, config.precision, placement)
    for other in _list_optimizers(shape):
        saved = held - _held_bytes(other, config.precision, placement)
        if max(other.stages) < placement.zero_stage:
            # Its states would no longer be partitioned.
            continue
        if saved > 0 and not other.find_problems(OptimConfig(), config.precision):
            yield Advice(
                change=f"{_title(other)} instead of {_title(optimizer)}",
                saves_bytes=int(saved * trained),
                where=where,
                override=f"optim={other.name}",
            )
    if placement.optimizer == "cpu":
        yield Advice(
            change=(
                "a quarter of the optimizer back on the accelerator, with another kernel of"
                f" {optimizer.title} there"
            ),
            saves_bytes=(master_and_states + FP32_BYTES * trained) // 4,
            where=where,
            override=None,
        )


def _title(optimizer: Optimizer) -> str:
    """Return the name by which an optimizer of matrices is told from that of the others."""
    return optimizer.matrix.title if optimizer.matrix is not None else optimizer.title


def _list_optimizers(shape: ModelShape) -> Iterator[Optimizer]:
    """List all optimizers that can train what is trained, with what they store of it."""
    for optimizer in OPTIMIZERS.list().values():
        # One for matrices alone is refused where there are none.
        with suppress(ConfigError):
            yield fit_optimizer(optimizer, shape)


def _held_bytes(optimizer: Optimizer, precision: Precision, placement: Placement) -> float:
    """Return the bytes per trained parameter that an optimizer holds between two steps."""
    held = optimizer.master_and_state_bytes
    if placement.optimizer != "none":
        # Its gradient too.
        return held + optimizer.master_bytes
    shared = placement.zero_stage == 3 and optimizer.master_bytes == element_bytes(precision)
    return held - optimizer.master_bytes if shared else held


def check_fits(config: Config, ladder: Ladder) -> None:
    """Refuse a job of which no rung fits.

    Raises:
        DoesNotFitError: With what every rung lacks, and the smallest change that would help.
    """
    if ladder.chosen is None:
        raise DoesNotFitError(describe_misfit(config, ladder))


def describe_misfit(config: Config, ladder: Ladder) -> str:
    """Say what is missing on every rung, and the smallest change under which the job fits."""
    shape = ladder.shape
    tuner = TUNERS.find(config.tuner.kind).describe(config.tuner)
    lines = [
        (
            f"{config.model.name_or_path} does not fit: {format_count(shape.parameters)}"
            f" parameters, {tuner} ({format_count(shape.trainable_parameters)} trainable),"
            f" {counted(ladder.world_size, 'rank')}, {config.precision.value}, rows of"
            f" {config.data.max_seq_length} tokens"
        ),
        (
            f"  has            {ladder.hardware.describe()}, of which {USABLE_SHARE:.0%} may be"
            " planned"
        ),
    ]
    lines += [f"  {rung.name:<14} {rung.reason}" for rung in ladder.rungs]
    lines.append(f"Try: {find_smallest_change(config, ladder)}")
    return "\n".join(lines)


def find_smallest_change(config: Config, ladder: Ladder) -> str:
    """Describe the first of a list of ever larger changes under which the job fits.

    Each change is tried by planning the job with it.
    """
    for change, changed, hardware in _changes(config, ladder):
        candidate = ladder.plan_again(changed, hardware).chosen
        if candidate is not None:
            device_bytes = format_bytes(candidate.memory.device.total)
            return f"{change} ({candidate.describe()}; {device_bytes} per rank)"
    return "a smaller model (model=llama3_8b, model=smollm2_135m), or many more accelerators"


Change = tuple[str, Config, Hardware]
"""A change in words, and the config and hardware with it."""


def _changes(config: Config, ladder: Ladder) -> Iterator[Change]:
    """List changes from the cheapest to the most expensive.

    These are the user's own restrictions, drives, ranks that share rows, shorter rows, optimizers,
    adapters, memory, machines.
    """
    hardware = ladder.hardware
    free = _without_restrictions(config, ladder)
    restricted = _restrictions(config, free, ladder)
    if restricted:
        yield " ".join(restricted), free, hardware

    if not hardware.nvme_bytes:
        drives = _needed_nvme(ladder, find_optimizer(config.optim))
        change = f"offload.nvme_path=/path on a drive with {format_bytes(drives)} free"
        yield change, free, replace(hardware, nvme_bytes=drives)

    for count in _larger_groups(config, ladder):
        shared = copy.deepcopy(free)
        shared.launch.sequence_parallel_size = count
        yield f"launch.sequence_parallel_size={count}", shared, hardware

    length = config.data.max_seq_length
    for shorter_length in (length // 2, length // 8):
        if shorter_length >= 256:
            shorter = copy.deepcopy(free)
            shorter.data.max_seq_length = shorter_length
            yield f"data.max_seq_length={shorter_length}", shorter, hardware

    for other in _smaller_optimizers(config, ladder.shape):
        changed = copy.deepcopy(free)
        changed.optim.kind = other.name
        yield f"optim={other.name}", changed, hardware

    if TUNERS.find(config.tuner.kind).trains_all:
        lora = copy.deepcopy(free)
        lora.tuner.kind = "lora"
        yield "tuner=lora", lora, hardware

    if hardware.accelerator == "cuda":
        yield from _more_hardware(free, ladder)


def _larger_groups(config: Config, ladder: Ladder) -> list[int]:
    """List the numbers of ranks that could share the tokens of rows, which changes no result."""
    groups: list[int] = []
    for count in range(config.launch.sequence_parallel_size + 1, ladder.world_size + 1):
        shared = replace(config, launch=replace(config.launch, sequence_parallel_size=count))
        with suppress(ConfigError):
            kernel = ladder.attn_implementation
            check_sequence_parallel(shared, ladder.shape, kernel, ladder.world_size)
            groups.append(count)
    return groups


def _smaller_optimizers(config: Config, shape: ModelShape) -> list[Optimizer]:
    """List optimizers with the same learning rate that store less, the largest first."""
    optimizer = fit_optimizer(find_optimizer(config.optim), shape)
    smaller = [
        other
        for other in _list_optimizers(shape)
        if other.master_and_state_bytes < optimizer.master_and_state_bytes
        and other.learning_rate_scale == optimizer.learning_rate_scale
        and not other.find_problems(config.optim, config.precision)
    ]
    return sorted(smaller, key=lambda other: -other.master_and_state_bytes)


def _without_restrictions(config: Config, ladder: Ladder) -> Config:
    """Return the config with everything left open that changes no result."""
    free = copy.deepcopy(config)
    free.offload = replace(OffloadConfig(), nvme_path=config.offload.nvme_path)
    free.zero.stage = "auto"
    free.train.per_device_train_batch_size = "auto"
    free.train.gradient_accumulation_steps = "auto"
    free.train.gradient_checkpointing = "auto"
    # The rows per step must stay the same.
    free.train.global_batch_size = ladder.rows.global_batch_size
    return free


def _restrictions(config: Config, free: Config, ladder: Ladder) -> list[str]:
    """Return the overrides that remove the user's restrictions."""
    train = config.train
    sets_rows_by_product = train.global_batch_size == "auto" and "auto" not in (
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
    )
    rows = ladder.rows.global_batch_size
    overrides = {
        "offload=auto": free.offload != config.offload,
        "zero=auto": config.zero.stage != "auto",
        f"train.global_batch_size={rows}": sets_rows_by_product,
        "train.per_device_train_batch_size=auto": train.per_device_train_batch_size != "auto",
        "train.gradient_accumulation_steps=auto": train.gradient_accumulation_steps != "auto",
        "train.gradient_checkpointing=auto": train.gradient_checkpointing != "auto",
    }
    return [override for override, restricts in overrides.items() if restricts]


def _more_hardware(config: Config, ladder: Ladder) -> Iterator[Change]:
    hardware = ladder.hardware
    host = _needed_host(ladder)
    if host > hardware.host_memory_bytes:
        change = f"{format_bytes(host)} of host memory"
        yield change, config, replace(hardware, host_memory_bytes=host)
    for factor in (2, 4, 8, 16):
        nodes = hardware.nodes * factor
        yield f"hardware.nodes={nodes}", config, replace(hardware, nodes=nodes)


def _needed_nvme(ladder: Ladder, optimizer: Optimizer) -> int:
    """Free space for weights and states, rounded up to half a terabyte or ten gigabytes."""
    swapped = optimizer.master_and_state_bytes + FP32_BYTES
    weights = 2 * ladder.shape.parameters
    needed = (weights + swapped * ladder.shape.trainable_parameters) / USABLE_SHARE
    unit = 5 * 10**11 if needed > 10**11 else 10**10
    return int(-(-needed // unit) * unit)


def _needed_host(ladder: Ladder) -> int:
    """Return the host memory per node for the cheapest offload to it, rounded up to 64 GB."""
    candidates: list[Candidate] = [
        c for c in ladder.candidates if c.placement.rung in ("optimizer_cpu", "cpu")
    ]
    needed = (
        min((c.memory.host.total for c in candidates), default=0)
        * ladder.cluster.ranks_on_node
        / USABLE_SHARE
    )
    unit = 64 * 10**9
    return int(-(-needed // unit) * unit)

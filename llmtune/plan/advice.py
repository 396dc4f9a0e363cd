"""Changes that only the user may make: those of the arithmetic with the memory they save, and the
smallest one under which a job fits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from llmtune.config.groups.zero import OffloadConfig
from llmtune.config.schema import Config
from llmtune.plan.devices.hardware import Hardware
from llmtune.plan.ladder import Candidate, Ladder, build_ladder
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.plan.memory.peak_memory import USABLE_SHARE
from llmtune.plan.memory.placement import Placement
from llmtune.tuner.tuner import TUNERS
from llmtune.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One change that alters what is computed."""

    change: str
    saves_bytes: int
    """On one rank's accelerator, or in its share of the host if that holds the optimizer."""
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
    if trained * 12 < 10**9:
        return
    if TUNERS.find(config.tuner.kind).trains_all:
        lora = shape.trainable_parameters * 12 // ladder.world_size
        yield Advice(
            change="train adapters only", saves_bytes=lora, where=where, override="tuner=lora"
        )
    yield Advice(
        change="master weights and moments in bf16 instead of fp32",
        saves_bytes=6 * trained,
        where=where,
        override=None,
    )
    yield Advice(
        change="moments in 8 bits (bitsandbytes)",
        saves_bytes=6 * trained,
        where=where,
        override=None,
    )
    if placement.optimizer == "cpu":
        yield Advice(
            change="a quarter of the optimizer back on the accelerator, with another AdamW there",
            saves_bytes=4 * trained,
            where=where,
            override=None,
        )


def find_smallest_change(config: Config, ladder: Ladder) -> str:
    """Describe the first of a list of ever larger changes under which the job fits.

    Each change is tried by planning the job with it.
    """
    for change, changed, hardware in _changes(config, ladder):
        candidate = _plan_again(changed, hardware, ladder).chosen
        if candidate is not None:
            device_bytes = format_bytes(candidate.memory.device.total)
            return f"{change} ({candidate.describe()}; {device_bytes} per rank)"
    return "a smaller model (model=llama3_8b, model=smollm2_135m), or many more accelerators"


def _plan_again(config: Config, hardware: Hardware, ladder: Ladder) -> Ladder:
    """The same job for changed config or hardware."""
    world_size = ladder.world_size * hardware.nodes // ladder.hardware.nodes
    rows = config.train.global_batch_size
    if isinstance(rows, int) and rows % world_size:
        # More ranks than before: rows rounded up to a multiple of them.
        rounded_up = math.ceil(rows / world_size) * world_size
        config = replace(config, train=replace(config.train, global_batch_size=rounded_up))
    if config.train.batch_schedule is not None:
        grown = [
            [start, math.ceil(size / world_size) * world_size]
            for start, size in config.train.batch_schedule
        ]
        config = replace(config, train=replace(config.train, batch_schedule=grown))
    shape = ladder.shape
    if not TUNERS.find(config.tuner.kind).trains_all:
        shape = resolve_shape(config.model, config.tuner)
    return build_ladder(config, hardware, shape, world_size, ladder.attn_implementation)


Change = tuple[str, Config, Hardware]
"""A change in words, and the config and hardware with it."""


def _changes(config: Config, ladder: Ladder) -> Iterator[Change]:
    """List changes from the cheapest to the most expensive.

    These are the user's own restrictions, drives, rows, adapters, memory, machines.
    """
    hardware = ladder.hardware
    free = _without_restrictions(config, ladder)
    restricted = _restrictions(config, free, ladder)
    if restricted:
        yield " ".join(restricted), free, hardware

    if not hardware.nvme_bytes:
        drives = _needed_nvme(ladder)
        change = f"offload.nvme_path=/path on a drive with {format_bytes(drives)} free"
        yield change, free, replace(hardware, nvme_bytes=drives)

    length = config.data.max_seq_length
    for shorter_length in (length // 2, length // 8):
        if shorter_length >= 256:
            shorter = copy.deepcopy(free)
            shorter.data.max_seq_length = shorter_length
            yield f"data.max_seq_length={shorter_length}", shorter, hardware

    if TUNERS.find(config.tuner.kind).trains_all:
        lora = copy.deepcopy(free)
        lora.tuner.kind = "lora"
        yield "tuner=lora", lora, hardware

    if hardware.accelerator == "cuda":
        yield from _more_hardware(free, ladder)


def _without_restrictions(config: Config, ladder: Ladder) -> Config:
    """The config with everything left open that changes no result."""
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
    """The overrides that remove the user's restrictions."""
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


def _needed_nvme(ladder: Ladder) -> int:
    """Free space for weights and states, rounded up to half a terabyte or ten gigabytes."""
    needed = (2 * ladder.shape.parameters + 16 * ladder.shape.trainable_parameters) / USABLE_SHARE
    unit = 5 * 10**11 if needed > 10**11 else 10**10
    return int(-(-needed // unit) * unit)


def _needed_host(ladder: Ladder) -> int:
    """Host memory of a node for the cheapest offload to it, rounded up to 64 GB."""
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

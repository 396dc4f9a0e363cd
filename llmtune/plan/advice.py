"""What would help and is never done by itself: changes of the arithmetic with what they save, and
what would make it fit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from llmtune.config.groups.zero import OffloadConfig
from llmtune.config.schema import Config
from llmtune.plan.devices.hardware import Hardware
from llmtune.plan.ladder import Candidate, Ladder
from llmtune.plan.memory.peak_memory import USABLE_SHARE
from llmtune.plan.memory.placement import Placement
from llmtune.tuner.tuner import TUNERS
from llmtune.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One change that alters what is computed."""

    change: str
    saves_bytes: int
    """On one rank's accelerator, or in its share of the host where that holds the optimizer."""
    where: str
    override: str | None
    """What to add to the command; None where llmtune has no such option."""


def list_advice(config: Config, ladder: Ladder) -> list[Advice]:
    """What would change the arithmetic, for the chosen candidate or the first rung's smallest."""
    candidate = ladder.chosen or next(
        (rung.candidate for rung in ladder.rungs if rung.candidate), None
    )
    if candidate is None:
        return []
    found = list(_state_advice(config, ladder, candidate.placement))
    device = candidate.memory.device
    length = config.data.max_seq_length
    by_length = device.activations + device.logits + device.working_set
    if length > 1024 and candidate.batch.micro_batch_size == 1:
        found.append(
            Advice(
                change="rows half as long",
                saves_bytes=by_length // 2,
                where="accelerator",
                override=f"data.max_seq_length={length // 2}",
            )
        )
    return sorted(found, key=lambda advice: -advice.saves_bytes)


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


Build = Callable[[Config, Hardware], Ladder]
"""A ladder for changed config or hardware."""


def smallest_change(config: Config, ladder: Ladder, build: Build) -> str:
    """The first of a list of ever larger changes under which the job fits, tried by planning it."""
    for change, other, hardware in _changes(config, ladder):
        found = build(other, hardware)
        if found.chosen is not None:
            candidate = found.chosen
            return (
                f"{change} ({candidate.describe()}; {format_bytes(candidate.memory.device.total)} a"
                " rank)"
            )
    return "a smaller model (model=llama3_8b, model=smollm2_135m), or many more accelerators"


def _changes(config: Config, ladder: Ladder) -> Iterator[tuple[str, Config, Hardware]]:
    """From what costs nothing to what costs most: the user's own restrictions, drives, rows,
    adapters, memory, machines.
    """
    hardware = ladder.hardware
    free = copy.deepcopy(config)
    free.offload = replace(OffloadConfig(), nvme_path=config.offload.nvme_path)
    free.zero.stage = "auto"
    free.train.per_device_train_batch_size = free.train.gradient_accumulation_steps = "auto"
    free.train.gradient_checkpointing = "auto"
    # What is freed must not change the rows of a step.
    free.train.global_batch_size = ladder.rows.global_batch_size
    train = config.train
    product = train.global_batch_size == "auto" and "auto" not in (
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
    )
    restricted = [
        name
        for name, changed in (
            ("offload=auto", free.offload != config.offload),
            ("zero=auto", config.zero.stage != "auto"),
            (f"train.global_batch_size={ladder.rows.global_batch_size}", product),
            ("train.per_device_train_batch_size=auto", train.per_device_train_batch_size != "auto"),
            ("train.gradient_accumulation_steps=auto", train.gradient_accumulation_steps != "auto"),
            ("train.gradient_checkpointing=auto", train.gradient_checkpointing != "auto"),
        )
        if changed
    ]
    if restricted:
        yield " ".join(restricted), free, hardware
    if not hardware.nvme_bytes:
        drives = _needed_nvme(ladder)
        yield (
            f"offload.nvme_path=/path on a drive with {format_bytes(drives)} free",
            free,
            replace(hardware, nvme_bytes=drives),
        )
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
    host = _needed_host(ladder)
    if hardware.accelerator == "cuda" and host > hardware.host_memory_bytes:
        yield (
            f"{format_bytes(host)} of host memory",
            free,
            replace(hardware, host_memory_bytes=host),
        )
    for factor in (2, 4, 8, 16) if hardware.accelerator == "cuda" else ():
        nodes = replace(hardware, nodes=hardware.nodes * factor)
        yield f"hardware.nodes={nodes.nodes}", free, nodes


def _needed_nvme(ladder: Ladder) -> int:
    """Free space for weights and states, rounded up to half a terabyte or ten gigabytes."""
    needed = (2 * ladder.shape.parameters + 16 * ladder.shape.trainable_parameters) / USABLE_SHARE
    unit = 5 * 10**11 if needed > 10**11 else 10**10
    return int(-(-needed // unit) * unit)


def _needed_host(ladder: Ladder) -> int:
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

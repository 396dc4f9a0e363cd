"""Config and hardware become one frozen plan: ranks, placement, batches, memory, steps, DeepSpeed's dictionary."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from llmtune.config.schema import Config, OffloadDevice, Precision, ScheduleConfig, TrainConfig, TunerKind
from llmtune.errors import ConfigError, DoesNotFitError, MissingPrerequisiteError
from llmtune.plan.batch import BatchPlan, resolve_batch
from llmtune.plan.deepspeed import adamw_parameters, to_deepspeed
from llmtune.plan.hardware import Hardware, fp16_supported, resolve_hardware
from llmtune.plan.learning_rate import resolve_learning_rate
from llmtune.plan.memory import MemoryPlan, Placement, activation_bytes, element_bytes, estimate_memory
from llmtune.plan.shape import ModelShape, resolve_shape
from llmtune.plan.units import format_bytes, format_count

#: Share of a memory that a plan may fill; the rest is fragmentation, the CUDA context, the operating system.
USABLE_SHARE = 0.92

#: Up to this length eager attention is the faster one on a CPU (SmolLM2-135M, 8 x 128 tokens on 2 cores: 419 against 316
#: tokens/s), and its quadratic memory is small.
SHORT_ROW_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Plan:
    """Every derived number of a run but the number of steps, which the data decides."""

    world_size: int
    hardware: Hardware
    shape: ModelShape
    placement: Placement
    batch: BatchPlan
    memory: MemoryPlan
    gradient_checkpointing: bool
    attn_implementation: str
    learning_rate: float
    deepspeed: dict[str, Any]
    notes: tuple[str, ...]
    """Where the derived values came from, for the page before step 1."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``plan.json`` and for the ranks."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """The inverse of :meth:`to_dict`."""
        return cls(
            world_size=values["world_size"],
            hardware=Hardware(**values["hardware"]),
            shape=ModelShape(**values["shape"]),
            placement=Placement(**values["placement"]),
            batch=BatchPlan(**values["batch"]),
            memory=MemoryPlan(**values["memory"]),
            gradient_checkpointing=values["gradient_checkpointing"],
            attn_implementation=values["attn_implementation"],
            learning_rate=values["learning_rate"],
            deepspeed=values["deepspeed"],
            notes=tuple(values["notes"]),
        )


@dataclass(frozen=True, slots=True)
class StepsPlan:
    """Length of the run, in optimizer steps."""

    total_steps: int
    warmup_steps: int
    total_rows: int | None
    """Rows of whole or broken epochs, after which the last step ends; None where ``max_steps`` decides."""
    origin: str

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StepsPlan:
        """From plain values."""
        return cls(**values)


def resolve_plan(config: Config, world_size: int | None = None) -> Plan:
    """Derive the plan and check that it fits.

    Args:
        world_size: Ranks that a foreign launcher started; without it, what config and hardware say.

    Raises:
        ConfigError: Numbers contradict each other.
        DoesNotFitError: The estimate is more than the hardware has.
        MissingPrerequisiteError: CUDA or the model's configuration is missing.
    """
    hardware = resolve_hardware(config.hardware)
    if config.precision is Precision.fp16 and not fp16_supported(hardware.accelerator):
        raise MissingPrerequisiteError("precision=fp16: this CPU has no fp16 arithmetic; take precision=bf16 or fp32")
    world = world_size or _resolve_world_size(config, hardware)
    batch = resolve_batch(config.train, world, config.data.max_seq_length, hardware.accelerator)
    shape = resolve_shape(config.model, config.tuner)
    notes = [f"ranks: {world} ({_world_origin(config, world_size)})"]
    checkpointing = _resolve_checkpointing(config, hardware, shape, batch, notes)
    placement, memory = _resolve_placement(config, hardware, shape, batch, checkpointing, notes)
    rate = resolve_learning_rate(config.optim, config.tuner.kind, shape.parameters, notes)
    optimizer = adamw_parameters(config.optim, rate, placement.offload_optimizer)
    deepspeed = to_deepspeed(placement, batch, shape, optimizer, config.precision, config.train.max_grad_norm)
    return Plan(
        world_size=world,
        hardware=hardware,
        shape=shape,
        placement=placement,
        batch=batch,
        memory=memory,
        gradient_checkpointing=checkpointing,
        attn_implementation=resolve_attention(config, hardware.accelerator),
        learning_rate=rate,
        deepspeed=deepspeed,
        notes=tuple(notes),
    )


def resolve_attention(config: Config, accelerator: str) -> str:
    """The attention that is asked for, or the faster one: torch's fused CPU kernel loses to plain matrices on short rows."""
    wanted = config.model.attn_implementation
    if wanted != "auto":
        return wanted
    return "eager" if accelerator == "cpu" and config.data.max_seq_length <= SHORT_ROW_TOKENS else "sdpa"


def resolve_steps(train: TrainConfig, schedule: ScheduleConfig, rows: int) -> StepsPlan:
    """Steps from ``max_steps`` if it is set, else from epochs; warm-up rounded up to whole steps.

    Raises:
        ConfigError: Warm-up leaves no step.
    """
    epoch_rows = max(1, round(train.num_train_epochs * rows))
    by_epochs = math.ceil(epoch_rows / train.global_batch_size)
    origin = f"{train.num_train_epochs:g} epoch(s) of {rows} rows, {train.global_batch_size} a step"
    total = by_epochs
    if train.max_steps is not None:
        # max_steps alone decides, as in the Hugging Face Trainer: it may also go round the data several times.
        total, origin = train.max_steps, f"train.max_steps ({origin} would be {by_epochs})"
    warmup = schedule.warmup_steps
    if warmup is None:
        warmup = math.ceil(schedule.warmup_ratio * total)
    if warmup >= total and warmup > 0 and total > 1:
        raise ConfigError(f"schedule.warmup_steps={warmup} leaves nothing of the {total} steps ({origin})")
    return StepsPlan(total, min(warmup, total - 1), None if train.max_steps else epoch_rows, origin)


def _resolve_world_size(config: Config, hardware: Hardware) -> int:
    wanted = config.launch.nproc
    if wanted is None:
        return hardware.device_count
    if hardware.accelerator == "cuda" and wanted > hardware.device_count:
        raise ConfigError(f"launch.nproc={wanted}: there are {hardware.device_count} GPU(s)")
    cores = os.cpu_count() or 1
    if hardware.accelerator == "cpu" and wanted > 4 * cores:
        raise ConfigError(f"launch.nproc={wanted}: this machine has {cores} cores")
    return wanted


def _world_origin(config: Config, launched: int | None) -> str:
    if launched:
        return "from the launcher"
    return "launch.nproc" if config.launch.nproc else "one a GPU, or one on a CPU"


def _resolve_checkpointing(
    config: Config, hardware: Hardware, shape: ModelShape, batch: BatchPlan, notes: list[str]
) -> bool:
    wanted = config.train.gradient_checkpointing
    if isinstance(wanted, bool):
        return wanted
    tokens = batch.micro_batch_size * config.data.max_seq_length
    ranks_on_device = batch.world_size if hardware.accelerator == "cpu" else 1
    saved = activation_bytes(shape, tokens, element_bytes(config.precision), gradient_checkpointing=False)
    needed = saved * ranks_on_device > 0.3 * hardware.device_memory_bytes
    notes.append(
        f"gradient checkpointing: {'on' if needed else 'off'} (activations would take about {format_bytes(saved)} a rank)"
    )
    return needed


def _resolve_placement(
    config: Config, hardware: Hardware, shape: ModelShape, batch: BatchPlan, checkpointing: bool, notes: list[str]
) -> tuple[Placement, MemoryPlan]:
    """The stage asked for, or the lowest that fits; an estimate above the hardware is refused."""
    offload_optimizer = config.offload.optimizer is not OffloadDevice.none
    offload_param = config.offload.param is not OffloadDevice.none
    stages = (0, 1, 2, 3) if config.zero.stage == "auto" else (int(config.zero.stage),)
    lowest = 3 if offload_param else 1 if offload_optimizer else 0
    tokens = batch.micro_batch_size * config.data.max_seq_length
    memory = None
    for stage in (stage for stage in stages if stage >= lowest):
        placement = Placement(stage, offload_optimizer, offload_param)
        memory = estimate_memory(shape, placement, config.precision, batch.world_size, tokens, checkpointing)
        if _fits(memory, hardware, placement, batch.world_size):
            if config.zero.stage == "auto":
                notes.append(f"ZeRO stage: {stage} (the lowest that fits)")
            return placement, memory
    assert memory is not None
    raise DoesNotFitError(_does_not_fit(config, hardware, shape, batch, memory, stages[-1]))


def _fits(memory: MemoryPlan, hardware: Hardware, placement: Placement, world_size: int) -> bool:
    if hardware.accelerator == "cpu":
        # Device and host are one pool that all ranks share.
        return (memory.device + memory.host) * world_size <= USABLE_SHARE * hardware.host_memory_bytes
    # Below ZeRO 3 each rank reads the whole model into host memory before DeepSpeed moves it.
    loading = memory.weights if placement.zero_stage < 3 else 0
    return (
        memory.device <= USABLE_SHARE * hardware.device_memory_bytes
        and max(memory.host, loading) * world_size <= USABLE_SHARE * hardware.host_memory_bytes
    )


def _does_not_fit(
    config: Config, hardware: Hardware, shape: ModelShape, batch: BatchPlan, memory: MemoryPlan, stage: int
) -> str:
    parts = {name: value for name, value in asdict(memory).items() if value}
    if hardware.accelerator == "cpu":
        needed, has = (memory.device + memory.host) * batch.world_size, hardware.host_memory_bytes
    elif memory.device > USABLE_SHARE * hardware.device_memory_bytes:
        needed, has = memory.device, hardware.device_memory_bytes
    else:
        needed, has = max(memory.host, memory.weights) * batch.world_size, hardware.host_memory_bytes
    tuner = f"LoRA r={config.tuner.lora_r}" if config.tuner.kind is TunerKind.lora else "full fine-tuning"
    tokens = batch.micro_batch_size * config.data.max_seq_length
    eight = estimate_memory(shape, Placement(3, False, False), config.precision, 8, tokens, True)
    lines = [
        f"{config.model.name_or_path} does not fit: {format_count(shape.parameters)} parameters, {tuner} "
        f"({format_count(shape.trainable_parameters)} trainable), ZeRO {stage}, {batch.world_size} rank(s), "
        f"{config.precision.value}",
        f"  needs   about {format_bytes(needed)}: "
        + ", ".join(f"{name} {format_bytes(value)}" for name, value in parts.items()),
        f"  has     {hardware.describe()}, of which {USABLE_SHARE:.0%} may be planned",
        f"  missing {format_bytes(needed - USABLE_SHARE * has)}",
        f"On 8 GPUs under ZeRO 3 with gradient checkpointing each needs about {format_bytes(eight.device)}.",
        "Try: " + "; ".join(_advice(config, hardware, batch)),
    ]
    return "\n".join(lines)


def _advice(config: Config, hardware: Hardware, batch: BatchPlan) -> list[str]:
    advice = []
    if config.tuner.kind is TunerKind.full:
        advice.append("tuner=lora")
    if config.zero.stage not in (3, "auto") and batch.world_size > 1:
        advice.append("zero=3")
    if hardware.accelerator == "cuda" and config.offload.param is OffloadDevice.none:
        advice.append("zero=3 offload=cpu")
    if batch.micro_batch_size > 1:
        advice.append("train.per_device_train_batch_size=1")
    if config.train.gradient_checkpointing is False:
        advice.append("train.gradient_checkpointing=true")
    return [*advice, "a smaller model (model=llama3_8b, model=smollm2_135m)", "more or larger GPUs"]

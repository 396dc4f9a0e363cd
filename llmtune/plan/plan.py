"""Config and hardware become one frozen plan: ranks, placement, batches, memory, DeepSpeed's keys.

The number of steps is in :mod:`llmtune.plan.steps`, because the data decides it.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from llmtune.config.cache_folder import find_cache
from llmtune.config.groups.train import TrainConfig
from llmtune.config.schema import Config, Precision
from llmtune.errors import ConfigError, DoesNotFitError, LlmtuneError, MissingPrerequisiteError
from llmtune.plan.abilities import check_kernel, check_row_length, check_stage
from llmtune.plan.advice import smallest_change
from llmtune.plan.batch_sizes import BatchPlan
from llmtune.plan.deepspeed_config import adamw_parameters, to_deepspeed, with_nvme_path
from llmtune.plan.deepspeed_overrides import check_raw, merge_raw
from llmtune.plan.devices.hardware import Hardware, fp16_supported, resolve_hardware
from llmtune.plan.ladder import Candidate, Ladder, build_ladder
from llmtune.plan.learning_rate import resolve_learning_rate
from llmtune.plan.memory.model_shape import ModelShape, resolve_shape
from llmtune.plan.memory.peak_memory import USABLE_SHARE, MemoryPlan
from llmtune.plan.memory.placement import Placement
from llmtune.tuner.tuner import TUNERS
from llmtune.units import counted, format_bytes, format_count, parse_bytes

#: Up to this length eager attention is the faster one on a CPU (SmolLM2-135M, 8 x 128 tokens on 2
#: cores: 419 against 316 tokens/s), and its quadratic memory is small.
SHORT_ROW_TOKENS = 512

#: Compute capability (Ampere) from which GPUs have bf16 and FlashAttention's kernels.
FIRST_WITH_BF16 = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every derived number of a run but the number of steps, which the data decides."""

    world_size: int
    hardware: Hardware
    shape: ModelShape
    placement: Placement
    batch: BatchPlan
    memory: MemoryPlan
    tokens_per_second: float
    """Predicted, for full rows."""
    gradient_checkpointing: bool
    attn_implementation: str
    learning_rate: float
    deepspeed: dict[str, Any]
    notes: tuple[str, ...]
    """Where the derived values came from, for the page before step 1."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the ranks."""
        values = asdict(self)
        # Hundreds of tensors that only planning needs.
        del values["shape"]["tensors"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """The inverse of :meth:`to_dict`."""
        parts = {
            "hardware": Hardware.from_dict(values["hardware"]),
            "shape": ModelShape.from_dict(values["shape"]),
            "placement": Placement(**values["placement"]),
            "batch": BatchPlan(**values["batch"]),
            "memory": MemoryPlan.from_dict(values["memory"]),
            "notes": tuple(values["notes"]),
        }
        return cls(**{**values, **parts})


def resolve_plan(
    config: Config, world_size: int | None = None, begun: TrainConfig | None = None
) -> Plan:
    """The plan of the ladder's choice.

    Args:
        world_size: Ranks that a foreign launcher started; without it, what config and hardware say.
        begun: What the run was started with, where it goes on.

    Raises:
        ConfigError: Numbers contradict each other.
        DoesNotFitError: No rung fits.
        MissingPrerequisiteError: CUDA or the model's configuration is missing.
    """
    ladder = resolve_ladder(config, world_size, begun=begun)
    if ladder.chosen is None:
        raise DoesNotFitError(describe_misfit(config, ladder))
    return plan_candidate(config, ladder, ladder.chosen, world_size is not None)


def resolve_ladder(
    config: Config,
    world_size: int | None = None,
    planning: bool = False,
    begun: TrainConfig | None = None,
) -> Ladder:
    """Every rung of this job.

    Args:
        planning: Nothing will run here: hardware that is named need not be there, and what would
            keep the job from being trained is noted in the ladder.
        begun: What the run was started with, where it goes on.

    Raises:
        As :func:`resolve_plan`, but for a job that does not fit.
    """
    refusals: list[str] = []

    def require(check: Callable[..., None], *values: Any) -> None:
        try:
            check(*values)
        except LlmtuneError as error:
            if not planning:
                raise
            refusals.append(str(error))

    check_raw(config.zero.deepspeed)
    on_node = max(1, world_size // config.hardware.nodes) if world_size else None
    hardware = resolve_hardware(config.hardware, config.offload.nvme_path, planning, on_node)
    _check_precision(config.precision, hardware)
    require(_check_trainable, config, hardware, world_size)
    if not planning and config.offload.nvme_path is None:
        # hardware.nvme_bytes alone is for planning.
        hardware = replace(hardware, nvme_bytes=0)
    world = world_size or _resolve_world_size(config, hardware)
    shape = resolve_shape(config.model, config.tuner, find_cache(config.paths))
    require(_check_causal, shape, config.model.name_or_path)
    require(
        check_row_length, config.data.max_seq_length, shape.max_positions, config.model.name_or_path
    )
    kernel = resolve_attention(
        config, hardware.accelerator, shape.kernels, hardware.compute_capability
    )
    ladder = build_ladder(config, hardware, shape, world, kernel, begun)
    if ladder.chosen is not None:
        require(
            check_stage, ladder.chosen.placement.zero_stage, shape.kind, config.model.name_or_path
        )
    return replace(ladder, refusals=tuple(refusals))


def plan_candidate(
    config: Config, ladder: Ladder, candidate: Candidate, launched: bool = False
) -> Plan:
    """The frozen numbers of one candidate of the ladder."""
    notes = [
        *ladder.hardware.notes,
        f"ranks: {ladder.world_size} ({_world_origin(config, launched)})",
    ]
    tuner = TUNERS.find(config.tuner.kind)
    rate = resolve_learning_rate(config.optim, tuner, ladder.shape.parameters, notes)
    notes += [ladder.rows.origin] if ladder.rows.origin else []
    notes += _describe_choice(config, ladder, candidate)
    optimizer = adamw_parameters(config.optim, rate)
    planned = to_deepspeed(
        candidate.placement,
        candidate.batch,
        candidate.sizes,
        optimizer,
        config.precision,
        config.train.max_grad_norm,
    )
    return Plan(
        world_size=ladder.world_size,
        hardware=ladder.hardware,
        shape=ladder.shape,
        placement=candidate.placement,
        batch=candidate.batch,
        memory=candidate.memory,
        tokens_per_second=candidate.speed.tokens_per_second,
        gradient_checkpointing=candidate.gradient_checkpointing,
        attn_implementation=ladder.attn_implementation,
        learning_rate=rate,
        deepspeed=merge_raw(planned, config.zero.deepspeed),
        notes=tuple(notes),
    )


def with_nvme(plan: Plan, folder: str) -> Plan:
    """The plan with a folder for what is swapped."""
    return replace(plan, deepspeed=with_nvme_path(plan.deepspeed, folder))


def with_changes(ladder: Ladder) -> Any:
    """A function that plans the same job for changed config or hardware."""

    def build(config: Config, hardware: Hardware) -> Ladder:
        world = ladder.world_size * hardware.nodes // ladder.hardware.nodes
        rows = config.train.global_batch_size
        if isinstance(rows, int) and rows % world:
            config = replace(
                config,
                train=replace(config.train, global_batch_size=math.ceil(rows / world) * world),
            )
        shape = (
            ladder.shape
            if TUNERS.find(config.tuner.kind).trains_all
            else resolve_shape(config.model, config.tuner)
        )
        return build_ladder(config, hardware, shape, world, ladder.attn_implementation)

    return build


def describe_misfit(config: Config, ladder: Ladder) -> str:
    """What is missing on every rung, and the smallest change that would do."""
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
    lines.append(f"Try: {smallest_change(config, ladder, with_changes(ladder))}")
    return "\n".join(lines)


def resolve_attention(
    config: Config, accelerator: str, kernels: tuple[str, ...], compute_capability: int = 0
) -> str:
    """The kernel asked for, or the one that is fast here, of those that the architecture has.

    Args:
        kernels: Of the architecture (:func:`llmtune.plan.abilities.attention_kernels`).
        compute_capability: Of the GPU; 0 where it is not known.

    Raises:
        ConfigError: The architecture lacks the kernel asked for.
    """
    wanted = config.model.attn_implementation
    if wanted != "auto":
        check_kernel(wanted, kernels, config.model.name_or_path)
        return wanted
    # FlashAttention's kernels are for 16 bits, and for Ampere and later.
    can_flash = (
        config.precision is not Precision.fp32 and not 0 < compute_capability < FIRST_WITH_BF16
    )
    packed = config.data.packing and "flash_attention_2" in kernels
    if accelerator == "cuda" and can_flash and packed and importlib.util.find_spec("flash_attn"):
        # Its varlen kernels skip what SDPA masks: the attention between the documents of a packed
        # row.
        return "flash_attention_2"
    short = accelerator == "cpu" and config.data.max_seq_length <= SHORT_ROW_TOKENS
    return "eager" if short or "sdpa" not in kernels else "sdpa"


def _resolve_world_size(config: Config, hardware: Hardware) -> int:
    wanted = config.launch.nproc
    if wanted is None:
        return hardware.device_count * hardware.nodes
    if hardware.nodes > 1:
        raise ConfigError(
            f"launch.nproc={wanted}: with hardware.nodes={hardware.nodes} leave it out"
        )
    if hardware.accelerator == "cuda" and wanted > hardware.device_count:
        raise ConfigError(
            f"launch.nproc={wanted}: this machine has {counted(hardware.device_count, 'GPU')}"
        )
    cores = len(os.sched_getaffinity(0))
    if hardware.accelerator == "cpu" and wanted > 4 * cores:
        raise ConfigError(f"launch.nproc={wanted}: this process may use {cores} cores")
    return wanted


def _world_origin(config: Config, launched: bool) -> str:
    if launched:
        return "from the launcher"
    return "launch.nproc" if config.launch.nproc else "one a GPU, or one on a CPU"


def _check_causal(shape: ModelShape, name: str) -> None:
    if not shape.causal:
        raise ConfigError(
            f"model.name_or_path={name}: no causal language model; it can be planned only"
        )


def _check_trainable(config: Config, hardware: Hardware, world_size: int | None) -> None:
    """What can be planned but not run here."""
    if config.precision is Precision.fp16 and not fp16_supported(hardware.accelerator):
        raise MissingPrerequisiteError(
            "precision=fp16: this CPU has no fp16 arithmetic; take precision=bf16 or fp32"
        )
    tuner = TUNERS.find(config.tuner.kind)
    if tuner.not_trained_yet is not None:
        raise ConfigError(
            f"tuner={tuner.name} can be planned, not trained yet: take {tuner.not_trained_yet}"
        )
    if config.launch.memory_limit is not None:
        parse_bytes(config.launch.memory_limit, "launch.memory_limit")
    if hardware.nodes > 1 and world_size is None:
        raise ConfigError(
            f"hardware.nodes={hardware.nodes}: llmtune starts the ranks of one machine; start"
            " several with torchrun scripts/train.py, or take hardware.nodes=1"
        )


def _check_precision(precision: Precision, hardware: Hardware) -> None:
    if precision is Precision.bf16 and 0 < hardware.compute_capability < FIRST_WITH_BF16:
        raise ConfigError(
            f"precision=bf16: {hardware.name} (compute capability"
            f" {hardware.compute_capability / 10:.1f}) has no bf16 arithmetic, and torch would"
            " emulate it at a fraction of the speed; take precision=fp16 or precision=fp32"
        )


def _describe_choice(config: Config, ladder: Ladder, candidate: Candidate) -> list[str]:
    """Where placement, micro-batch and checkpointing came from."""
    notes = []
    if config.zero.stage == "auto" or config.offload.optimizer.value == "auto":
        others = [rung.name for rung in ladder.rungs if rung.candidate and rung.candidate.fits]
        fitting = (
            "the only one that fits"
            if len(others) < 2
            else f"the fastest of {len(others)} that fit"
        )
        if candidate is not ladder.chosen:
            fitting = "further down the ladder, because memory ran out"
        if config.offload.optimizer.value != "auto" and candidate is ladder.chosen:
            notes.append(
                f"placement: {candidate.placement.rung} as set, with ZeRO"
                f" {candidate.placement.zero_stage}"
            )
        else:
            notes.append(
                f"placement: {candidate.placement.rung}, ZeRO {candidate.placement.zero_stage}"
                f" ({fitting})"
            )
    if config.train.gradient_checkpointing == "auto":
        state = "on" if candidate.gradient_checkpointing else "off"
        saved = format_bytes(candidate.memory.device.activations)
        notes.append(
            f"gradient checkpointing: {state} (activations of a micro-batch: {saved} a rank)"
        )
    notes += _describe_adapters(config, ladder.shape)
    if ladder.activations_origin != "traced":
        notes.append("activations: a rough estimate, because this architecture could not be traced")
    return notes


def _describe_adapters(config: Config, shape: ModelShape) -> list[str]:
    """What ``all-linear`` reaches where that is not all that the name says."""
    if config.tuner.target_modules != "all-linear" or not shape.adapted:
        return []
    if not shape.stacked_parameters and not shape.left_alone:
        return []
    text = f"tuner.target_modules=all-linear: adapters on {', '.join(shape.adapted)}"
    if shape.left_alone:
        text += f"; none on {', '.join(shape.left_alone)}"
    if shape.stacked_parameters:
        share = shape.stacked_parameters / shape.parameters
        text += (
            "; none on the router and the experts, whose stacked tensors are no linear layers"
            f" ({share:.0%} of the model)"
        )
    return [text]

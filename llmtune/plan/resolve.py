"""Derive the plan of a run from the config and the hardware, before any rank starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtune.config.byte_sizes import parse_bytes
from llmtune.config.cache_folder import find_cache
from llmtune.config.groups.train import TrainConfig
from llmtune.config.schema import Config, Precision
from llmtune.errors import ConfigError, LlmtuneError, MissingPrerequisiteError
from llmtune.optimizer.optimizer import find_optimizer
from llmtune.plan.abilities import (
    NEVER,
    TOGETHER,
    check_compile,
    check_kernels,
    check_recomputing,
    check_row_length,
    check_stage,
    describe_kernels,
    resolve_attention,
)
from llmtune.plan.advice import check_fits
from llmtune.plan.architecture.corrected_architecture import describe_correction
from llmtune.plan.architecture.rope_scaling import describe_scaling
from llmtune.plan.deepspeed_config import to_deepspeed
from llmtune.plan.deepspeed_overrides import check_raw, merge_raw
from llmtune.plan.devices.gpus import FIRST_WITH_BF16
from llmtune.plan.devices.hardware import Hardware
from llmtune.plan.devices.measured import use_measured
from llmtune.plan.devices.probe import fp16_supported, resolve_hardware
from llmtune.plan.ladder import Candidate, Ladder
from llmtune.plan.learning_rate import resolve_learning_rate
from llmtune.plan.length.sequence_parallel import check_sequence_parallel
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.plan.memory.shapes import ModelShape
from llmtune.plan.param_groups import check_groups, describe_groups
from llmtune.plan.plan import Plan
from llmtune.plan.search import build_ladder
from llmtune.task.task import TASKS
from llmtune.tuner.coverage import Weight, describe_coverage
from llmtune.tuner.token_rows.settings import TOKEN_ROWS
from llmtune.tuner.tuner import TUNERS
from llmtune.units import counted, format_bytes


def resolve_plan(
    config: Config, world_size: int | None = None, begun: TrainConfig | None = None
) -> Plan:
    """Plan the candidate that the ladder chooses.

    Args:
        world_size: Ranks that a foreign launcher started; None takes them from config and hardware.
        begun: The settings that the run was started with, where it is resumed.

    Raises:
        ConfigError: Settings contradict each other.
        DoesNotFitError: No rung fits.
        MissingPrerequisiteError: CUDA or the model's configuration is missing.
    """
    ladder = resolve_ladder(config, world_size, begun=begun)
    check_fits(config, ladder)
    assert ladder.chosen is not None
    return plan_candidate(config, ladder, ladder.chosen, world_size is not None)


def resolve_ladder(
    config: Config,
    world_size: int | None = None,
    planning: bool = False,
    begun: TrainConfig | None = None,
) -> Ladder:
    """Evaluate every rung of this job, and choose one.

    Args:
        planning: The job is planned only: named hardware need not be present, and what would keep
            the job from being trained is noted in the ladder's ``refusals``.
        begun: The settings that the run was started with, where it is resumed.

    Raises:
        The errors of :func:`resolve_plan`, except for a job that does not fit.
    """
    refusals: list[str] = []

    def require(check: Callable[..., None], *values: Any) -> None:
        try:
            check(*values)
        except LlmtuneError as error:
            if not planning:
                raise
            refusals.append(str(error))

    # The hardware.
    check_raw(config.zero.deepspeed)
    on_node = max(1, world_size // config.hardware.nodes) if world_size else None
    hardware = resolve_hardware(config.hardware, config.offload.nvme_path, planning, on_node)
    _check_precision(config.precision, hardware)
    require(_check_trainable, config, hardware, world_size)
    if not planning and config.offload.nvme_path is None:
        # hardware.nvme_bytes alone is for planning.
        hardware = replace(hardware, nvme_bytes=0)

    # The model on it.
    world = world_size or _resolve_world_size(config, hardware)
    shape = resolve_shape(config.model, config.tuner, find_cache(config.paths))
    require(_check_task, shape, config.model.name_or_path)
    _check_settings(config, shape)
    require(_check_row_length, config, shape)
    kernel = resolve_attention(
        config, hardware.accelerator, shape.kernels, hardware.compute_capability
    )
    check_sequence_parallel(config, shape, kernel, world)
    require(check_kernels, config.model.kernels, hardware.accelerator)
    hardware = _measured(config, hardware, shape)

    # The rungs; the stage that was chosen may be one that the architecture cannot use.
    ladder = build_ladder(config, hardware, shape, world, kernel, begun)
    if ladder.chosen is not None:
        stage = ladder.chosen.placement.zero_stage
        require(check_stage, stage, shape.kind, config.model.name_or_path)
        require(check_compile, config.train, stage, TUNERS.find(config.tuner.kind).is_quantized)
    notes = (*hardware.notes, *_describe_model(config, hardware, shape))
    return replace(ladder, refusals=tuple(refusals), notes=notes)


def _describe_model(config: Config, hardware: Hardware, shape: ModelShape) -> Iterator[str]:
    """Say what is changed in the model: its configuration, its positions, its kernels."""
    in_fp32 = config.precision is Precision.fp32
    described = (
        describe_correction(Path(config.model.name_or_path).expanduser()),
        describe_scaling(config.model.rope_scaling, shape.max_positions),
        describe_kernels(config.model.kernels, hardware.accelerator, in_fp32),
    )
    yield from filter(None, described)


def _measured(config: Config, hardware: Hardware, shape: ModelShape) -> Hardware:
    """Take the speed of this machine from runs and products, where that is asked for.

    Raises:
        ConfigError: Other hardware than this machine's is named, or a speed.
    """
    if not config.hardware.measured:
        return hardware
    for key in ("gpu_flops", "compute_efficiency"):
        value = getattr(config.hardware, key)
        if value is not None:
            raise ConfigError(
                f"hardware.{key}={value}: hardware=measured measures it; take hardware=probe to"
                " set it"
            )
    if config.hardware.gpu_name is not None:
        raise ConfigError(
            f"hardware.measured=true: hardware.gpu_name={config.hardware.gpu_name} names other"
            " hardware, which cannot be measured here; take hardware=measured"
        )
    cache = find_cache(config.paths)
    return use_measured(hardware, config.precision, shape.parameters, cache)


def _check_settings(config: Config, shape: ModelShape) -> None:
    """Refuse settings of the optimizer and of recomputation that the model does not have."""
    check_groups(config.optim, shape)
    check_recomputing(
        config.train.gradient_checkpointing,
        shape.recomputing,
        shape.layers,
        config.model.name_or_path,
    )


def _check_row_length(config: Config, shape: ModelShape) -> None:
    check_row_length(
        config.data.max_seq_length,
        shape.max_positions,
        config.model.name_or_path,
        _scaled_by(config, shape),
    )


def _scaled_by(config: Config, shape: ModelShape) -> float | None:
    """Return by what rotary positions are multiplied; None where they cannot be."""
    if config.model.rope_scaling:
        return float(config.model.rope_scaling["factor"])
    return 1.0 if shape.scalable else None


def plan_candidate(
    config: Config, ladder: Ladder, candidate: Candidate, launched: bool = False
) -> Plan:
    """Plan one candidate of the ladder.

    Args:
        launched: The ranks were started by a foreign launcher.
    """
    notes = [
        *ladder.notes,
        f"ranks: {ladder.world_size} ({_world_origin(config, launched)})",
    ]
    tuner, optimizer = TUNERS.find(config.tuner.kind), find_optimizer(config.optim)
    rate = resolve_learning_rate(config.optim, tuner, ladder.shape.parameters, notes)
    notes += describe_groups(config.optim, config.tuner, ladder.shape, rate)
    notes += [ladder.rows.origin] if ladder.rows.origin else []
    notes += describe_choice(config, ladder, candidate)
    planned = to_deepspeed(
        candidate.placement,
        candidate.batch,
        candidate.sizes,
        optimizer.to_deepspeed(config.optim, rate),
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
        recomputed=candidate.recomputed,
        attn_implementation=ladder.attn_implementation,
        learning_rate=rate,
        deepspeed=merge_raw(planned, config.zero.deepspeed),
        notes=tuple(notes),
    )


def _resolve_world_size(config: Config, hardware: Hardware) -> int:
    ranks = config.launch.nproc
    if ranks is None:
        return hardware.device_count * hardware.nodes
    if hardware.nodes > 1:
        raise ConfigError(
            f"launch.nproc={ranks}: with hardware.nodes={hardware.nodes} leave it out"
        )
    if hardware.accelerator == "cuda" and ranks > hardware.device_count:
        raise ConfigError(
            f"launch.nproc={ranks}: this machine has {counted(hardware.device_count, 'GPU')}"
        )
    cores = len(os.sched_getaffinity(0))
    if hardware.accelerator == "cpu" and ranks > 4 * cores:
        raise ConfigError(f"launch.nproc={ranks}: this process may use {cores} cores")
    return ranks


def _world_origin(config: Config, launched: bool) -> str:
    if launched:
        return "from the launcher"
    return "launch.nproc" if config.launch.nproc else "one per GPU, or one on a CPU"


def _check_task(shape: ModelShape, name: str) -> None:
    if not shape.trainable:
        task = TASKS.find(shape.task)
        raise ConfigError(
            f"model.name_or_path={name}: no model for {task.title} (model.task={task.name}):"
            f" transformers' {task.model_class} does not build {shape.kind}; it can be planned only"
        )


def _check_trainable(config: Config, hardware: Hardware, world_size: int | None) -> None:
    """Refuse what can be planned but not run here."""
    if config.precision is Precision.fp16 and not fp16_supported(hardware.accelerator):
        raise MissingPrerequisiteError(
            "precision=fp16: this CPU has no fp16 arithmetic; take precision=bf16 or fp32"
        )
    key = "stage3_use_all_reduce_for_fetch_params"
    if TUNERS.find(config.tuner.kind).is_quantized and config.zero.deepspeed.get(
        "zero_optimization", {}
    ).get(key):
        raise ConfigError(
            f"zero.deepspeed.zero_optimization.{key}=true adds numbers, and tuner="
            f"{config.tuner.kind} gathers bytes of 4-bit weights; leave the key out"
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


def describe_choice(config: Config, ladder: Ladder, candidate: Candidate) -> list[str]:
    """Say where placement, micro-batch size and checkpointing came from, one line each."""
    notes = []
    if config.zero.stage == "auto" or config.offload.optimizer.value == "auto":
        notes.append(f"placement: {_describe_placement(config, ladder, candidate)}")
    if config.train.gradient_checkpointing == "auto":
        notes.append(_describe_recomputing(ladder.shape, candidate))
    notes += _describe_adapters(config, ladder.shape)
    if TUNERS.find(config.tuner.kind).has_adapter and ladder.shape.tensors:
        notes.append(_describe_coverage(ladder.shape))
    if ladder.activations_origin != "traced":
        notes.append("activations: a rough estimate, because this architecture could not be traced")
    return notes


def _describe_recomputing(shape: ModelShape, candidate: Candidate) -> str:
    saved = format_bytes(candidate.memory.device.activations)
    about = f"activations of a micro-batch: {saved} per rank"
    if shape.recomputing == TOGETHER:
        about += "; its layers can be computed again together, not one by one"
    elif shape.recomputing == NEVER:
        about += "; transformers cannot compute its layers again"
    return f"gradient checkpointing: {candidate.recomputed.describe()} ({about})"


def _describe_placement(config: Config, ladder: Ladder, candidate: Candidate) -> str:
    rung, stage = candidate.placement.rung, candidate.placement.zero_stage
    if candidate is not ladder.chosen:
        return f"{rung}, ZeRO {stage} (further down the ladder, because memory ran out)"
    if config.offload.optimizer.value != "auto":
        return f"{rung} as set, with ZeRO {stage}"
    fitting = sum(1 for other in ladder.rungs if other.candidate and other.candidate.fits)
    if fitting < 2:
        return f"{rung}, ZeRO {stage} (the only one that fits)"
    return f"{rung}, ZeRO {stage} (the fastest of {fitting} that fit)"


def _describe_coverage(shape: ModelShape) -> str:
    """Say which share of the model's own matrices is reached, and what names stacked experts."""
    text = describe_coverage(_list_weights(shape))
    if not shape.unreached_stacks:
        return text
    names = ",".join(shape.unreached_stacks)
    return f"{text}; tuner.target_parameters=[{names}] adapts the rest of the experts"


def _list_weights(shape: ModelShape) -> list[Weight]:
    """List the model's own matrices, and how much of each is trained, by adapters or itself."""
    rows = {
        tensor.name.partition(TOKEN_ROWS)[0]: tensor.numel
        for tensor in shape.tensors
        if TOKEN_ROWS in tensor.name
    }
    weights = []
    for tensor in shape.tensors:
        if tensor.adapter or tensor.vector:
            continue
        is_whole = tensor.trained or tensor.adapted
        reached = tensor.numel if is_whole else rows.get(tensor.name.removesuffix(".weight"), 0)
        weights.append(Weight(tensor.name, tensor.numel, reached))
    return weights


def _describe_adapters(config: Config, shape: ModelShape) -> list[str]:
    """Say what ``all-linear`` reaches, where that is not every linear layer."""
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

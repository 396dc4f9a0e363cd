"""The frozen plan of a run: ranks, placement, batches, memory and DeepSpeed's dictionary.

It is derived from the config and the hardware before any rank starts.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from llmtune.config.cache_folder import find_cache
from llmtune.config.groups.train import TrainConfig
from llmtune.config.schema import Config, Precision
from llmtune.errors import ConfigError, DoesNotFitError, LlmtuneError, MissingPrerequisiteError
from llmtune.plan.abilities import check_row_length, check_stage, resolve_attention
from llmtune.plan.batch_sizes import BatchPlan
from llmtune.plan.deepspeed_config import adamw_parameters, to_deepspeed, with_nvme_path
from llmtune.plan.deepspeed_overrides import check_raw, merge_raw
from llmtune.plan.devices.gpus import FIRST_WITH_BF16
from llmtune.plan.devices.hardware import Hardware, fp16_supported, resolve_hardware
from llmtune.plan.ladder import Candidate, Ladder, build_ladder
from llmtune.plan.learning_rate import resolve_learning_rate
from llmtune.plan.memory.model_shape import ModelShape, resolve_shape
from llmtune.plan.memory.peak_memory import MemoryPlan
from llmtune.plan.memory.placement import Placement
from llmtune.plan.report import describe_choice, describe_misfit
from llmtune.tuner.tuner import TUNERS
from llmtune.units import counted, parse_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every derived value of a run except the number of steps, which depends on the data."""

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
        """Return plain values, for ``plan.json`` and for the ranks."""
        values = asdict(self)
        # Hundreds of tensors that only planning needs.
        del values["shape"]["tensors"]
        return values


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
    if ladder.chosen is None:
        raise DoesNotFitError(describe_misfit(config, ladder))
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
    """Plan one candidate of the ladder.

    Args:
        launched: The ranks were started by a foreign launcher.
    """
    notes = [
        *ladder.hardware.notes,
        f"ranks: {ladder.world_size} ({_world_origin(config, launched)})",
    ]
    tuner = TUNERS.find(config.tuner.kind)
    rate = resolve_learning_rate(config.optim, tuner, ladder.shape.parameters, notes)
    notes += [ladder.rows.origin] if ladder.rows.origin else []
    notes += describe_choice(config, ladder, candidate)
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
    """Return the plan with the folder of the swap files."""
    return replace(plan, deepspeed=with_nvme_path(plan.deepspeed, folder))


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
    return "launch.nproc" if config.launch.nproc else "one a GPU, or one on a CPU"


def _check_causal(shape: ModelShape, name: str) -> None:
    if not shape.causal:
        raise ConfigError(
            f"model.name_or_path={name}: no causal language model; it can be planned only"
        )


def _check_trainable(config: Config, hardware: Hardware, world_size: int | None) -> None:
    """Refuse what can be planned but not run here."""
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

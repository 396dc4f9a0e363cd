"""The schema of ``conf/``: every key, its type, unit and default; groups are in ``groups/``.

The classes are not frozen, because Hydra cannot compose over frozen ones; nothing writes to them
after ``compose_config`` returned. What is derived from them lives in the frozen plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from llmtune.config.groups.chat import ChatConfig
from llmtune.config.groups.checkpoint import CheckpointConfig
from llmtune.config.groups.data import DataConfig
from llmtune.config.groups.export import ExportConfig
from llmtune.config.groups.hardware import HardwareConfig
from llmtune.config.groups.launch import LaunchConfig
from llmtune.config.groups.model import ModelConfig
from llmtune.config.groups.paths import PathsConfig
from llmtune.config.groups.tracker import TrackerConfig
from llmtune.config.groups.train import TrainConfig
from llmtune.config.groups.zero import OffloadConfig, ZeroConfig


class Precision(Enum):
    """Dtype of weights, activations and gradients.

    Master weights and Adam moments are always fp32.
    """

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


@dataclass(slots=True, kw_only=True)
class TunerConfig:
    """What is trained: everything, or LoRA adapters."""

    kind: str = MISSING
    """``full``, ``lora``, or ``qlora`` (LoRA on weights in 4 bits; it can be planned, not trained
    yet).
    """
    adapter_path: str | None = None
    """A peft adapter folder to go on from; its ranks, scales and modules are taken, and need not be
    set.
    """
    lora_r: int = 16
    """Rank of the adapters."""
    lora_alpha: int | float = 32
    """Scale: the update is ``lora_alpha / lora_r * B @ A``."""
    rank_pattern: dict[str, Any] = field(default_factory=dict)
    """Name or regular expression of modules -> another rank, as in peft: ``{q_proj: 8}``."""
    alpha_pattern: dict[str, Any] = field(default_factory=dict)
    """The same for ``lora_alpha``."""
    use_rslora: bool = False
    """Divide ``lora_alpha`` by the square root of the rank (rsLoRA)."""
    lora_dropout: float = 0.0
    """Dropout on the adapters' input."""
    target_modules: Any = "all-linear"
    """``all-linear`` (all but the head), or a list of module name endings."""


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """AdamW."""

    learning_rate: int | float | str = "auto"
    """Peak learning rate; ``auto`` follows tuner and model size."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; 1-D parameters have none."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of the two moments."""
    eps: float = 1e-8
    """Added to the denominator."""


@dataclass(slots=True)
class ScheduleConfig:
    """Learning rate over the steps."""

    lr_scheduler_type: str = "cosine"
    """``cosine`` and ``linear`` fall to 0 at the last step; ``constant`` stays."""
    warmup_ratio: float = 0.05
    """Share of all steps over which the rate rises linearly."""
    warmup_steps: int | None = None
    """Warm-up in optimizer steps, instead of the ratio."""


@dataclass(slots=True, kw_only=True)
class Config:
    """The whole config; only ``config``, ``plan``, ``run``, ``cli`` and the builders see it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tuner: TunerConfig = field(default_factory=TunerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    run_name: str | None = None
    """Name of the run; without it, the names of model, tuner and data."""
    output_dir: str | None = None
    """The run's folder; without it, ``runs/<run_name>``."""
    seed: int = 42
    """Seed of the split, the order of rows, new adapters and dropout."""
    precision: Precision = Precision.bf16
    """``bf16``, ``fp16`` or ``fp32``."""
    resume_from_checkpoint: str = "auto"
    """``auto`` (the newest in the run folder), ``none``, or a checkpoint folder."""
    run: str | None = None
    """Run folder that ``export``, ``eval`` and ``chat`` work on."""
    base: str | None = None
    """Base model, instead of the configured one."""
    adapter: str | None = None
    """Adapter folder to put on ``base``."""
    key: str | None = None
    """Public ed25519 key (PEM) with which ``verify`` checks who wrote a folder."""
    trace: bool = False
    """Print tracebacks (``debug=trace``)."""

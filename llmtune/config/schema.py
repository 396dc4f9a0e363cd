"""The schema of ``conf/``: every key, its type, unit and default; groups are in ``groups/``.

The classes are not frozen, because Hydra cannot compose over frozen ones; nothing writes to them
after ``compose_config`` returned. What is derived from them lives in the frozen plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from llmtune.config.groups.checkpoint import CheckpointConfig
from llmtune.config.groups.data import DataConfig
from llmtune.config.groups.export import ExportConfig
from llmtune.config.groups.hardware import HardwareConfig
from llmtune.config.groups.launch import LaunchConfig
from llmtune.config.groups.model import ModelConfig
from llmtune.config.groups.optim import OptimConfig
from llmtune.config.groups.paths import PathsConfig
from llmtune.config.groups.profile import ProfileConfig
from llmtune.config.groups.schedule import ScheduleConfig
from llmtune.config.groups.tracker import TrackerConfig
from llmtune.config.groups.train import TrainConfig
from llmtune.config.groups.tuner import TunerConfig
from llmtune.config.groups.verbs.chat import ChatConfig
from llmtune.config.groups.verbs.hparams_search import HparamsSearchConfig
from llmtune.config.groups.verbs.predict import PredictConfig
from llmtune.config.groups.verbs.report import ReportConfig
from llmtune.config.groups.verbs.runs import RunsConfig
from llmtune.config.groups.verbs.serve import ServeConfig
from llmtune.config.groups.verbs.target import TargetConfig
from llmtune.config.groups.zero import OffloadConfig, ZeroConfig


class Precision(Enum):
    """Dtype of weights, activations and gradients.

    Master weights and the optimizer's states are fp32, unless the optimizer keeps them otherwise.
    """

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


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
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    runs: RunsConfig = field(default_factory=RunsConfig)
    hparams_search: HparamsSearchConfig = field(default_factory=HparamsSearchConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    run_name: str | None = None
    """Name of the run; without it, the names of model, tuner and data."""
    output_dir: str | None = None
    """The run's folder; without it, ``runs/<run_name>``."""
    seed: int = 42
    """Seed of the split, the order of rows, new adapters and dropout."""
    precision: Precision = Precision.bf16
    """Dtype of weights, activations and gradients: ``bf16``, ``fp16`` or ``fp32``."""
    resume_from_checkpoint: str = "auto"
    """``auto`` (the newest in the run folder), ``none``, or a checkpoint folder."""
    key: str | None = None
    """Public ed25519 key (PEM) with which ``verify`` checks who wrote a folder."""
    trace: bool = False
    """Print tracebacks (``debug=trace``)."""

"""The keys of ``tracker``: experiment trackers beside the files of the run folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class TrackerMode(Enum):
    """W&B's own modes."""

    online = "online"
    offline = "offline"


@dataclass(slots=True, kw_only=True)
class TrackerConfig:
    """Experiment trackers beside the run folder's own files."""

    kind: str = "none"
    """``none``, ``wandb`` (its key comes from WANDB_API_KEY or ``.env``), or another service.

    The others are ``tensorboard``, ``prometheus``, ``trackio``, and ``mlflow`` (at the address of
    MLFLOW_TRACKING_URI, or in the run folder).
    """
    kinds: list[str] = field(default_factory=list)
    """Several trackers at once, beside that of ``kind``: ``[wandb,tensorboard]``."""
    mode: TrackerMode = TrackerMode.online
    """``offline`` sends nothing: W&B writes below the run folder, for ``wandb sync``."""
    project: str = "llmtune"
    """Project the run belongs to; MLflow calls it an experiment."""
    entity: str | None = None
    """User or team at W&B."""
    artifacts: bool = False
    """Store files of a finished run at W&B: what was trained, the best checkpoint, the report.

    They are those for using a model: the optimizer's state is left out.
    """
    artifact_max_bytes: Any = "2GB"
    """Largest model or checkpoint that ``artifacts`` stores; a larger one is left out and named."""
    prometheus_port: int = 9464
    """Port of Prometheus' endpoint, ``/metrics``."""
    prometheus_host: str = "127.0.0.1"
    """Address on which it listens: this machine alone, unless another one is asked for."""
    webhook: str | None = None
    """Address that gets one JSON at the end, at a failure, a restart and a fallback.

    It is a secret, which LLMTUNE_WEBHOOK can hold instead, in the environment or ``.env``.
    """

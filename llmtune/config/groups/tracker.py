"""The keys of ``tracker``: an experiment tracker beside the files of the run folder."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class TrackerMode(Enum):
    """W&B's own modes."""

    online = "online"
    offline = "offline"


@dataclass(slots=True, kw_only=True)
class TrackerConfig:
    """An experiment tracker beside the run folder's own files."""

    kind: str = "none"
    """``none`` or ``wandb``; the key comes from WANDB_API_KEY or ``.env``."""
    mode: TrackerMode = TrackerMode.online
    """``offline`` writes below the run folder for ``wandb sync``."""
    project: str = "llmtune"
    """Project the run belongs to."""
    entity: str | None = None
    """User or team."""

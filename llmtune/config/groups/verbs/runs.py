"""The keys of ``runs``, for ``llmtune runs``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Prune(Enum):
    """The files that ``llmtune runs`` removes."""

    nothing = "nothing"
    checkpoints = "checkpoints"
    cache = "cache"


@dataclass(slots=True, kw_only=True)
class RunsConfig:
    """Listing run folders, and removing what finished runs no longer need."""

    prune: Prune = Prune.nothing
    """``checkpoints`` removes those of finished runs but for the last, the best and the published.

    The trained model, its exports and the checkpoint from which training could go on stay.
    ``cache`` removes converted models and prepared rows from ``paths.cache_dir`` that nobody has
    used for ``unused_days``; they are made again when they are needed.
    """
    unused_days: float = 7.0
    """Days after which ``cache`` takes what was neither read nor written for unused."""
    dry_run: bool = False
    """Only say what would be removed, and how much room that would free."""

"""The keys of ``paths``: folders outside the run."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass(slots=True)
class PathsConfig:
    """Folders outside the run."""

    cache_dir: str = MISSING
    """Converted models and tokenized data; can be deleted at any time.

    This user's own folder, made with mode 0700.
    """

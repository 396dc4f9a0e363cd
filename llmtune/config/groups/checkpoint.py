"""The keys of ``checkpoint``: how checkpoints are written, kept and copied."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class OnDiskLow(Enum):
    """The reaction to a checkpoint that does not fit on the disk."""

    stop = "stop"
    prune = "prune"
    skip = "skip"


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """Writing, keeping and copying of checkpoints."""

    background: bool | str = "auto"
    """Copy to host memory, and write while training continues; ``auto`` if memory allows it."""
    keep_every: int | None = None
    """Checkpoints at multiples of this step are never removed."""
    metric_for_best_model: str | None = None
    """A key of evaluation lines, such as ``eval_loss`` or ``loss``.

    A new best is saved, and its checkpoint is never removed. Null takes the task's where a best
    model is needed.
    """
    greater_is_better: bool | str = "auto"
    """A greater value of that metric is better.

    ``auto`` says so of all names but those that end in ``loss``, ``perplexity`` or ``mse``.
    """
    on_disk_low: OnDiskLow = OnDiskLow.stop
    """Reaction to a disk without room for the next checkpoint: ``stop``, ``prune`` or ``skip``.

    ``prune`` removes older checkpoints, but never the last; ``skip`` leaves the new one out.
    """
    mirror: str | None = None
    """URL that complete checkpoints are copied to.

    Examples are ``s3://bucket/folder``, ``gs://``, ``oss://`` and a folder on another disk.
    """
    sign: str | None = None
    """Private ed25519 key (PEM) that signs checkpoints, trained weights and exports.

    ``verify key=`` checks the signature.
    """

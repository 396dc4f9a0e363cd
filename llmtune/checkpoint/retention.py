"""Decide which checkpoints are kept (newest, best, every n steps), and remove the others."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtune.checkpoint.find import find_checkpoints, remove_checkpoint
from llmtune.config.best_model import BestModel
from llmtune.storage import layout
from llmtune.storage.plain_json import parse_json


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A complete checkpoint, and what decides whether it is kept."""

    folder: Path
    step: int
    metrics: dict[str, float]
    """Results of the evaluation at its step; empty without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """The user's choice of checkpoints to keep."""

    limit: int | None = None
    """Keep this many of the newest; None keeps all."""
    every: int | None = None
    """Keep those whose step is a multiple of this."""
    best: BestModel | None = None
    """Keep the one with the best value of this rule's metric."""

    def to_remove(
        self, checkpoints: Sequence[CheckpointInfo], limit: int | None = None
    ) -> list[CheckpointInfo]:
        """List the checkpoints to remove, oldest first.

        Args:
            checkpoints: All complete ones, oldest first.
            limit: Replaces the user's when the disk is full; at least one stays.
        """
        limit = self.limit if limit is None else max(1, limit)
        if limit is None:
            return []
        best = find_best(checkpoints, self.best) if self.best is not None else None
        return [
            checkpoint
            for checkpoint in checkpoints[:-limit]
            if checkpoint is not best and not (self.every and checkpoint.step % self.every == 0)
        ]


def find_best(checkpoints: Sequence[CheckpointInfo], rule: BestModel) -> CheckpointInfo | None:
    """Find the checkpoint with the best value of the metric, the older of equal ones.

    Args:
        checkpoints: Oldest first.
    """
    best: CheckpointInfo | None = None
    for checkpoint in checkpoints:
        value = checkpoint.metrics.get(rule.metric)
        so_far = best.metrics[rule.metric] if best is not None else None
        if value is not None and rule.is_better(value, so_far):
            best = checkpoint
    return best


def list_checkpoints(run: Path) -> list[CheckpointInfo]:
    """List the complete checkpoints of a run with their metrics, oldest first."""
    checkpoints = []
    for folder in find_checkpoints(run):
        step = layout.checkpoint_step(folder) or 0
        checkpoints.append(CheckpointInfo(folder, step, read_metrics_of(folder)))
    return checkpoints


def read_metrics_of(checkpoint: Path) -> dict[str, float]:
    """Read the results of the evaluation at a checkpoint's step; empty without one."""
    try:
        manifest = parse_json((checkpoint / layout.MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    metrics: dict[str, float] = manifest.get("metrics", {})
    return metrics


def prune_checkpoints(
    run: Path, retention: Retention, busy: Container[Path] = (), limit: int | None = None
) -> list[str]:
    """Remove the checkpoints that retention does not keep.

    Args:
        busy: Folders that are being copied elsewhere, which stay.
        limit: Replaces the user's when the disk is full.

    Returns:
        The names of the removed folders.
    """
    removed = []
    for checkpoint in retention.to_remove(list_checkpoints(run), limit):
        if checkpoint.folder not in busy:
            remove_checkpoint(checkpoint.folder)
            removed.append(checkpoint.folder.name)
    return removed

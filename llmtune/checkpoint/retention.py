"""Decide which checkpoints are kept (newest, best, every n steps), and remove the others."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtune.checkpoint.find import find_checkpoints, remove_checkpoint
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
    metric: str | None = None
    """Keep the one with the best value of this metric."""
    greater_is_better: bool = False

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
        best = self.best(checkpoints)
        return [
            checkpoint
            for checkpoint in checkpoints[:-limit]
            if checkpoint is not best and not (self.every and checkpoint.step % self.every == 0)
        ]

    def best(self, checkpoints: Sequence[CheckpointInfo]) -> CheckpointInfo | None:
        """Find the checkpoint with the best value of the metric, the older of equal ones."""
        if self.metric is None:
            return None
        sign = -1 if self.greater_is_better else 1
        ranked = [
            (sign * checkpoint.metrics[self.metric], checkpoint.step, checkpoint)
            for checkpoint in checkpoints
            if self.metric in checkpoint.metrics
        ]
        return min(ranked, key=lambda item: item[:2])[2] if ranked else None


def list_checkpoints(run: Path) -> list[CheckpointInfo]:
    """List the complete checkpoints of a run with their metrics, oldest first."""
    checkpoints = []
    for folder in find_checkpoints(run):
        try:
            metrics = parse_json((folder / layout.MANIFEST).read_text()).get("metrics", {})
        except (OSError, ValueError):
            metrics = {}
        checkpoints.append(CheckpointInfo(folder, layout.checkpoint_step(folder) or 0, metrics))
    return checkpoints


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

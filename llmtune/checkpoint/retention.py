"""Which checkpoints are kept: the newest, the best, every so many steps; never none."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtune.checkpoint.find import find_checkpoints, remove_checkpoint
from llmtune.storage import layout
from llmtune.storage.plain_json import parse_json


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A complete checkpoint, as retention sees it."""

    folder: Path
    step: int
    metrics: dict[str, float]
    """Of the evaluation at its step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What a user wants to keep."""

    limit: int | None = None
    """Newest checkpoints; None for all."""
    every: int | None = None
    """Steps that this divides."""
    metric: str | None = None
    """The checkpoint where it was best."""
    greater_is_better: bool = False

    def to_remove(
        self, checkpoints: Sequence[CheckpointInfo], limit: int | None = None
    ) -> list[CheckpointInfo]:
        """What may go, oldest first.

        Args:
            checkpoints: Complete ones, oldest first.
            limit: Instead of the user's, when the disk is full; at least one stays.
        """
        limit = self.limit if limit is None else max(1, limit)
        if limit is None:
            return []
        best = self.best(checkpoints)
        return [
            kept
            for kept in checkpoints[:-limit]
            if kept is not best and not (self.every and kept.step % self.every == 0)
        ]

    def best(self, checkpoints: Sequence[CheckpointInfo]) -> CheckpointInfo | None:
        """The checkpoint with the best value of the metric, the older of equal ones."""
        metric = self.metric
        judged = [kept for kept in checkpoints if metric is not None and metric in kept.metrics]
        sign = -1 if self.greater_is_better else 1
        return (
            min(judged, key=lambda kept: (sign * kept.metrics[str(metric)], kept.step))
            if judged
            else None
        )


def list_checkpoints(run: Path) -> list[CheckpointInfo]:
    """The complete checkpoints of a run, oldest first."""
    found = []
    for folder in find_checkpoints(run):
        try:
            metrics = parse_json((folder / layout.MANIFEST).read_text()).get("metrics", {})
        except (OSError, ValueError):
            metrics = {}
        found.append(CheckpointInfo(folder, layout.checkpoint_step(folder) or 0, metrics))
    return found


def prune_checkpoints(
    run: Path, retention: Retention, busy: Container[Path] = (), limit: int | None = None
) -> list[str]:
    """Remove what is superfluous, but for what is being copied elsewhere; the names that went."""
    gone = []
    for kept in retention.to_remove(list_checkpoints(run), limit):
        if kept.folder not in busy:
            remove_checkpoint(kept.folder)
            gone.append(kept.folder.name)
    return gone

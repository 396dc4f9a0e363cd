"""Remove the checkpoints of a finished run that neither its result nor a resume needs."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from llmtune.checkpoint.find import find_checkpoints, remove_checkpoint
from llmtune.storage import layout
from llmtune.storage.lock import hold_lock
from llmtune.storage.manifest import is_complete
from llmtune.storage.rank_files import FinishedRecord

#: What :class:`llmtune.train.run_folder.RunFolder` makes of checkpoints of steps to come.
_SUPERSEDED = re.compile(r"superseded-checkpoint-\d+")


@dataclass(frozen=True, slots=True)
class Removable:
    """A checkpoint that can be removed."""

    folder: Path
    freed_bytes: int
    """Bytes of files that have no other name, as those of the result have."""


def find_removable(run: Path) -> list[Removable]:
    """List the checkpoints of a finished run that can be removed, oldest first.

    What stays: the newest checkpoint, from which training goes on with more steps; the best one,
    and the one that was published. Links are left alone: what they lead to is not the run's.

    Returns:
        Nothing for a run that is not finished, or whose trained model is not complete.
    """
    finished = FinishedRecord.read(run)
    results = [run / name for name in (layout.ADAPTER, layout.MODEL)]
    if finished is None or not any(is_complete(folder) for folder in results):
        return []
    complete = find_checkpoints(run)
    kept = {finished.step, finished.published_step}
    kept.add(finished.best.get("step") if finished.best is not None else None)
    removable = [folder for folder in complete[:-1] if layout.checkpoint_step(folder) not in kept]
    removable += sorted(
        folder for folder in run.iterdir() if _SUPERSEDED.fullmatch(folder.name) and folder.is_dir()
    )
    return [Removable(f, _measure_freed(f)) for f in removable if not f.is_symlink()]


def prune_finished(run: Path) -> list[Removable]:
    """Remove the checkpoints of :func:`find_removable` while no run uses the folder.

    Returns:
        What was removed.

    Raises:
        CheckpointError: A run uses the folder.
    """
    with hold_lock(run / layout.LOCK):
        removed = find_removable(run)
        for item in removed:
            remove_checkpoint(item.folder)
        return removed


def _measure_freed(folder: Path) -> int:
    freed = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            status = os.lstat(os.path.join(parent, name))  # noqa: PTH118 - many files
            freed += 512 * status.st_blocks if status.st_nlink == 1 else 0
    return freed

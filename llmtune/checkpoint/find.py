"""Which checkpoints a run folder holds."""

from __future__ import annotations

import shutil
from pathlib import Path

from llmtune.storage import layout

#: Behind the name of a checkpoint that is being replaced by one of the same step.
REPLACED = ".old.tmp"


def find_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first. A folder without its marker does not exist."""
    if not run.is_dir():
        return []
    found = [(layout.checkpoint_step(folder), folder) for folder in run.iterdir()]
    return [
        folder
        for step, folder in sorted((s, f) for s, f in found if s is not None)
        if is_complete(folder)
    ]


def is_complete(folder: Path) -> bool:
    """Whether the folder was published."""
    return (folder / layout.COMPLETE).is_file()


def remove_checkpoint(folder: Path) -> None:
    """Remove a published folder; the marker goes first, so that none is left half-gone."""
    (folder / layout.COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def sweep_incomplete(run: Path) -> list[str]:
    """Remove what a save that was cut off left behind; the names that went."""
    restore_replaced(run)
    swept = []
    for folder in sorted(run.iterdir()) if run.is_dir() else []:
        half = folder.name.endswith(".tmp") or (
            layout.checkpoint_step(folder) is not None and not is_complete(folder)
        )
        if folder.is_dir() and half:
            shutil.rmtree(folder)
            swept.append(folder.name)
    return swept


def restore_replaced(run: Path) -> None:
    """Give a checkpoint its name back whose replacement was never finished."""
    for old in sorted(run.glob(f"*{REPLACED}")) if run.is_dir() else []:
        folder = old.with_name(old.name.removesuffix(REPLACED))
        if is_complete(old) and not is_complete(folder):
            shutil.rmtree(folder, ignore_errors=True)
            old.rename(folder)

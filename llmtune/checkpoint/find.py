"""Which checkpoints a run folder holds."""

from __future__ import annotations

import shutil
from pathlib import Path

from llmtune.storage import layout
from llmtune.storage.atomic import ASIDE, REPLACED, remove_folder, restore_replaced
from llmtune.storage.manifest import is_complete


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


def remove_checkpoint(folder: Path) -> None:
    """Remove a published folder; the marker goes first, so that none is left half-gone."""
    (folder / layout.COMPLETE).unlink(missing_ok=True)
    remove_folder(folder)


def sweep_incomplete(run: Path) -> list[str]:
    """Remove what a save that was cut off left behind; return the names that went."""
    restore_checkpoints(run)
    swept = []
    for folder in sorted(run.iterdir()) if run.is_dir() else []:
        half = folder.name.endswith(ASIDE) or (
            layout.checkpoint_step(folder) is not None and not is_complete(folder)
        )
        if folder.is_dir() and half:
            shutil.rmtree(folder)
            swept.append(folder.name)
    return swept


def restore_checkpoints(run: Path) -> None:
    """Give every folder of a run its name back whose replacement was cut off."""
    for old in sorted(run.glob(f"*{REPLACED}")) if run.is_dir() else []:
        restore_replaced(old.with_name(old.name.removesuffix(REPLACED)), is_complete)

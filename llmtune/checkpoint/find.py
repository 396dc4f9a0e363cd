"""Find the checkpoints of a run folder, and clean up after saves that were cut off."""

from __future__ import annotations

import shutil
from pathlib import Path

from llmtune.storage import layout
from llmtune.storage.atomic import ASIDE, REPLACED, remove_folder, restore_replaced
from llmtune.storage.manifest import is_complete


def find_checkpoints(run: Path) -> list[Path]:
    """List the complete checkpoints, oldest first; a folder without its marker does not count."""
    if not run.is_dir():
        return []
    folders = [(layout.checkpoint_step(folder), folder) for folder in run.iterdir()]
    numbered = sorted((step, folder) for step, folder in folders if step is not None)
    return [folder for _, folder in numbered if is_complete(folder)]


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, its marker first, so that none is half-gone and marked complete."""
    (folder / layout.COMPLETE).unlink(missing_ok=True)
    remove_folder(folder)


def sweep_incomplete(run: Path) -> list[str]:
    """Remove what saves that were cut off left behind.

    Returns:
        The names of the removed folders.

    Raises:
        OSError: The disk refused.
    """
    restore_checkpoints(run)
    if not run.is_dir():
        return []
    swept = []
    for folder in sorted(run.iterdir()):
        half = folder.name.endswith(ASIDE) or (
            layout.checkpoint_step(folder) is not None and not is_complete(folder)
        )
        if folder.is_dir() and half:
            shutil.rmtree(folder)
            swept.append(folder.name)
    return swept


def restore_checkpoints(run: Path) -> None:
    """Give every folder of a run its name back whose replacement was cut off."""
    for old in sorted(run.glob(f"*{REPLACED}")):
        restore_replaced(old.with_name(old.name.removesuffix(REPLACED)), is_complete)

"""Which checkpoints a run folder holds, and which may go."""

from __future__ import annotations

import shutil
from pathlib import Path

from llmtune.checkpoint import names


def find_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first. A folder without its marker does not exist."""
    if not run.is_dir():
        return []
    found = [(names.checkpoint_step(folder), folder) for folder in run.iterdir()]
    return [folder for step, folder in sorted((s, f) for s, f in found if s is not None) if is_complete(folder)]


def is_complete(folder: Path) -> bool:
    """Whether the folder was published."""
    return (folder / names.COMPLETE).is_file()


def prune_checkpoints(run: Path, keep: int | None) -> None:
    """Remove all but the newest ``keep`` complete checkpoints; the marker goes first, so that none is left half-gone."""
    if keep is None:
        return
    for folder in find_checkpoints(run)[:-keep]:
        (folder / names.COMPLETE).unlink()
        shutil.rmtree(folder)


def sweep_incomplete(run: Path) -> list[str]:
    """Remove what a save that was cut off left behind; the names that went."""
    swept = []
    for folder in sorted(run.iterdir()) if run.is_dir() else []:
        half = folder.name.endswith(".tmp") or (names.checkpoint_step(folder) is not None and not is_complete(folder))
        if folder.is_dir() and half:
            shutil.rmtree(folder)
            swept.append(folder.name)
    return swept

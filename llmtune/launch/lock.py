"""One run a folder: a lock that the kernel drops when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtune.errors import CheckpointError
from llmtune.trust import open_lock


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` for the length of the block.

    Raises:
        CheckpointError: Another process holds it, or it cannot be made.
        MissingPrerequisiteError: Something else is in its place.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open_lock(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror}; free space there, or take another output_dir="
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{path.parent}: another run is using this folder (process {file.read().strip() or 'unknown'}); "
                "wait for it, or take another run_name= or output_dir="
            ) from error
        file.truncate(0)
        # For whoever is refused. A full disk has no room for it.
        with contextlib.suppress(OSError):
            os.write(file.fileno(), str(os.getpid()).encode())
        yield

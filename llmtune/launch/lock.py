"""One run a folder: a lock that the kernel drops when its holder dies, however it dies."""

from __future__ import annotations

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
        CheckpointError: Another process holds it.
        MissingPrerequisiteError: Something else is in its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{path.parent}: another run is using this folder (process {file.read().strip() or 'unknown'}); "
                "wait for it, or take another run_name= or output_dir="
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield

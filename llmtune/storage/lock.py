"""One run a folder: a lock that the kernel drops when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from llmtune.errors import CheckpointError
from llmtune.security.trust import open_lock

#: Lock files that this process holds.
_held: set[Path] = set()


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` for the length of the block.

    Raises:
        CheckpointError: Another process holds it, or it cannot be made.
        MissingPrerequisiteError: Something else is in its place.
    """
    with _take(path) as file:
        file.truncate(0)
        # For whoever is refused. A full disk has no room for it.
        with contextlib.suppress(OSError):
            os.write(file.fileno(), str(os.getpid()).encode())
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)


def _take(path: Path) -> IO[str]:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open_lock(path)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written: {error.strerror}; free space there, or take another"
                " output_dir="
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                holder = file.read().strip() or "unknown"
            raise CheckpointError(
                f"{path.parent}: another run is using this folder (process {holder}); "
                "wait for it, or take another run_name= or output_dir="
            ) from error
        # Its holder may have removed it, with the folder, since it was opened here; then others
        # take another file.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


@contextmanager
def removed_if_unused(path: Path) -> Iterator[None]:
    """Leave no folder behind that a block made, took the lock of, and wrote nothing into before it
    failed.

    It must still hold the lock then: another process may be in the folder, which has written no
    more yet.
    """
    was_there = path.parent.exists()
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if path in _held and not was_there and list(path.parent.iterdir()) == [path]:
                path.unlink()
                path.parent.rmdir()
        raise

"""Locks that the kernel drops when their holder dies, however it dies (``flock``).

Not filelock: it does not say which process holds a lock, takes a pipe in the place of the file, and
where a file system has no flock it falls back to files that outlive a killed holder.
"""

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


def try_lock(file: IO[str] | int) -> bool:
    """Take the lock of an open file or folder; False where another process holds it.

    The lock is held until the file is closed.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_lock(file: IO[str] | int) -> None:
    """Take the lock of an open file or folder, however long another process holds it."""
    fcntl.flock(file, fcntl.LOCK_EX)


@contextmanager
def hold_lock(path: Path, instead: str = "run_name= or output_dir=") -> Iterator[None]:
    """Hold the lock file of a run folder for the length of the block.

    Args:
        instead: The keys that name another folder, for the message.

    Raises:
        CheckpointError: Another process holds it, or it cannot be made.
        MissingPrerequisiteError: Something else is in its place.
    """
    with _take(path, instead) as file:
        file.truncate(0)
        # The process id is for the message of a process that is refused. A full disk has no room
        # for it.
        with contextlib.suppress(OSError):
            os.write(file.fileno(), str(os.getpid()).encode())
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)


def _take(path: Path, instead: str) -> IO[str]:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open_lock(path)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written: {error.strerror}; free space there, or take another"
                f" {instead}"
            ) from error
        if not try_lock(file):
            with file:
                holder = file.read().strip() or "unknown"
            raise CheckpointError(
                f"{path.parent}: another run is using this folder (process {holder}); "
                f"wait for it, or take another {instead}"
            )
        # Its last holder may have removed it, with the folder, since it was opened here. Then
        # others lock another file of that name.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def find_holder(path: Path) -> int | None:
    """Find the process that holds a lock file, without disturbing one that is about to take it.

    Returns:
        The process id; None where nobody holds it, or a process of another machine does.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        pid = int(os.read(file, 32).strip() or b"0")
        # The lock is tried only where its last holder lives: a run that starts just now writes its
        # id behind the lock, and would be refused because of the trial.
        is_held = pid > 0 and Path(f"/proc/{pid}").exists() and not try_lock(file)
        return pid if is_held else None
    except (OSError, ValueError):
        return None
    finally:
        os.close(file)


@contextmanager
def removed_if_unused(path: Path) -> Iterator[None]:
    """Remove the folder that a block made and locked, if it fails before it writes anything else.

    The block must still hold the lock then: another process may be in the folder, which has written
    nothing else yet either.
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

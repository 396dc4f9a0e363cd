"""Write files and folders that are there completely or not at all, after a kill or a full disk too.

They are written aside, flushed and renamed, then the folder that holds the new name is flushed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llmtune.storage.plain_json import parse_json

#: Ends of the names of a folder that is being written, and of one that is being replaced.
ASIDE = ".tmp"
REPLACED = ".old.tmp"
#: End of the name of a file that is being written. The name begins with a dot: a folder that holds
#: nothing else yet counts as empty.
_PART = ".part"


def flush(path: Path) -> None:
    """Have the kernel write a file, or the names in a folder, to the disk (``fsync``)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a small file of one process; the old content stays until the new one is on the disk.

    Raises:
        OSError: The disk refused.
    """
    with open_atomically(path) as file:
        file.write(_encode(data))


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write to, which one process does; it gets its name when the block ends.

    The old content stays until the new one is on the disk.

    Raises:
        OSError: The disk refused.
    """
    aside = path.with_name(f".{path.name}{_PART}")
    # Opened before: a process that sees the new file may rename its folder at once.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        os.fsync(folder)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    finally:
        os.close(folder)


def write_cache_file(path: Path, data: str | bytes) -> None:
    """Write a file of a cache, which several processes may write at once; makes its folder.

    It is not flushed, so that readers must expect an empty file after a crash of the machine.

    Raises:
        OSError: The disk refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}{_PART}")
    try:
        aside.write_bytes(_encode(data))
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def remove_parts(folder: Path) -> None:
    """Remove the parts of files whose writing was killed, before the folder's files are listed."""
    for part in list(folder.rglob(f".*{_PART}")):
        part.unlink()


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, and flush it.

    Raises:
        OSError: The disk refused; part of the line may be there.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """Read a small JSON file; None where there is none, and for one that a crash cut off."""
    try:
        return parse_json(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def link_or_copy(source: Path, target: Path) -> bool:
    """Give a file a second name, and replace what has that name.

    The new name is a hard link where the file system has them, otherwise a flushed copy.

    Returns:
        Whether it is a link.

    Raises:
        OSError: The disk refused.
    """
    # A copy onto a link would write into the file behind it.
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
        flush(target)
        return False
    return True


def aside_path(folder: Path) -> Path:
    """Return the path that a folder is written to before it gets its name."""
    return folder.with_name(folder.name + ASIDE)


def replaced_path(folder: Path) -> Path:
    """Return the path that the old folder is moved to while a new one takes its name."""
    return folder.with_name(folder.name + REPLACED)


def remove_folder(folder: Path) -> None:
    """Remove a folder, or a link to one; what is missing or cannot be removed is skipped."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def make_empty(folder: Path) -> None:
    """Make a folder, without what a process that was killed left in it.

    Raises:
        OSError: The disk refused.
    """
    remove_folder(folder)
    folder.mkdir(parents=True)


def move_folder(folder: Path, target: Path) -> None:
    """Give a folder another name, and replace what has that name."""
    remove_folder(target)
    folder.rename(target)
    flush(target.parent)


def replace_folder(
    aside: Path,
    folder: Path,
    is_complete: Callable[[Path], bool],
    seal: Callable[[Path], None] | None = None,
) -> None:
    """Give a finished folder its name; keep an older one until the new one is complete.

    A process that is killed in between leaves one of the two under its own name, or the old one for
    :func:`restore_replaced` to bring back. The files in ``aside`` must be flushed already.

    Args:
        is_complete: Tells whether a folder counts.
        seal: Makes the folder complete, once it has its name.

    Raises:
        OSError: The disk refused.
    """
    restore_replaced(folder, is_complete)
    old = replaced_path(folder)
    remove_folder(old)
    flush(aside)
    if folder.exists() or folder.is_symlink():
        folder.rename(old)
    aside.rename(folder)
    if seal is not None:
        seal(folder)
    flush(folder.parent)
    remove_folder(old)


def restore_replaced(folder: Path, is_complete: Callable[[Path], bool]) -> None:
    """Give an old folder its name back whose replacement was cut off; call it at the next start."""
    old = replaced_path(folder)
    if is_complete(old) and not is_complete(folder):
        remove_folder(folder)
        old.rename(folder)
        flush(folder.parent)


@contextlib.contextmanager
def write_cache_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write a cache's folder in; it gets its name when the block ends.

    Several processes may write the same one at once. Where another was first, its folder stays:
    it is as good.

    Raises:
        OSError: The disk refused.
    """
    aside = folder.with_name(f"{folder.name}.{os.getpid()}{ASIDE}")
    make_empty(aside)
    try:
        yield aside
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        remove_folder(aside)


def _encode(data: str | bytes) -> bytes:
    return data.encode() if isinstance(data, str) else data

"""Find and remove what is in the cache and has not been used for a while."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from llmtune.storage import layout
from llmtune.storage.atomic import ASIDE, remove_folder

#: Folders of the cache whose entries are made again when they are needed.
ROOMS = (
    "data/hashes",
    "data/prepared",
    "data/tokens",
    "models",
    "report",
    "shapes",
    "traces",
    "weights",
)


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A file or a folder of the cache."""

    path: Path
    nbytes: int
    unused_seconds: float
    """Seconds since a file of it was last read or written.

    Where a file system notes no access, since it was written.
    """


def find_unused(cache: Path, seconds: float) -> list[CacheEntry]:
    """List the entries that nobody has used for so long, the largest first.

    Links are left alone, and so are locks, which a process may be about to take.
    """
    found = []
    for room in ROOMS:
        folder = cache / room
        if not folder.is_dir() or folder.is_symlink():
            continue
        for path in folder.iterdir():
            if path.is_symlink() or path.name.endswith(layout.LOCK):
                continue
            entry = _measure(path)
            if entry.unused_seconds >= seconds:
                found.append(entry)
    return sorted(found, key=lambda entry: (-entry.nbytes, entry.path))


def remove_entry(entry: CacheEntry) -> None:
    """Remove an entry; nobody finds a part of it, also where this process is killed."""
    if not entry.path.is_dir():
        entry.path.unlink(missing_ok=True)
        return
    aside = entry.path.with_name(f"{entry.path.name}.{os.getpid()}{ASIDE}")
    entry.path.rename(aside)
    remove_folder(aside)


def _measure(path: Path) -> CacheEntry:
    """Measure a file, or a folder with all that is in it."""
    files = [path]
    for parent, folders, names in os.walk(path):
        files += [Path(parent, name) for name in (*folders, *names)]
    used, nbytes = 0.0, 0
    for file in files:
        try:
            status = file.lstat()
        except OSError:
            # Another process has just removed it.
            continue
        # Listing a folder, as here, is an access too.
        is_folder = file.is_dir() and not file.is_symlink()
        used = max(used, status.st_mtime, 0.0 if is_folder else status.st_atime)
        nbytes += 512 * status.st_blocks
    return CacheEntry(path, nbytes, max(0.0, time.time() - used))

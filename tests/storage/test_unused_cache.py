"""The cache loses what nobody uses, and nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path

from llmtune.storage.unused_cache import ROOMS, find_unused, remove_entry

DAY = 86400.0


def make(path: Path, read_days: float, written_days: float) -> Path:
    """Write a file that was last read and written so many days ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * 5000)
    now = time.time()
    os.utime(path, (now - read_days * DAY, now - written_days * DAY))
    return path


def age_folder(folder: Path, days: float) -> None:
    then = time.time() - days * DAY
    os.utime(folder, (then, then))


def test_what_was_read_or_written_lately_stays(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    unused = []
    for room in ROOMS:
        old, lately = cache / room / "old", cache / room / "lately"
        for name in ("config.json", "deep/model.safetensors"):
            make(old / name, 9, 20)
        make(lately / "config.json", 9, 9)
        make(lately / "model.safetensors", 1, 20)
        for folder in (old / "deep", old, lately):
            age_folder(folder, 20)
        unused += [old, make(cache / room / "file.json", 8, 8)]
    # Neither of these is made again, or may be missing.
    make(cache / "models" / "old.lock", 30, 30)
    make(cache / "predict" / "place.json", 30, 30)
    elsewhere = make(tmp_path / "elsewhere" / "file", 30, 30)
    (cache / "models" / "link").symlink_to(elsewhere.parent)

    found = find_unused(cache, 7 * DAY)
    assert {entry.path for entry in found} == set(unused)
    sizes = [entry.nbytes for entry in found]
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes) >= 5000
    # Looking is no use.
    assert {entry.path for entry in find_unused(cache, 7 * DAY)} == set(unused)
    assert find_unused(cache, 10 * DAY) == []

    for entry in found:
        remove_entry(entry)
    left = {path for room in ROOMS for path in (cache / room).iterdir()}
    assert {path.name for path in left} == {"lately", "old.lock", "link"}
    assert elsewhere.is_file()
    assert find_unused(tmp_path / "none", 0) == []


def test_what_a_killed_process_left_aside_is_removed_too(tmp_path: Path) -> None:
    part = make(tmp_path / "models" / "tiny.4711.tmp" / "file", 9, 9).parent
    age_folder(part, 9)
    (entry,) = find_unused(tmp_path, DAY)
    assert entry.path == part
    remove_entry(entry)
    assert list((tmp_path / "models").iterdir()) == []

"""What a published folder holds: every file with its size and hash, written before the folder is
renamed into place.

The marker that is written last holds the manifest's own hash, so that nothing in the folder goes
unchecked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from llmtune import __version__
from llmtune.errors import CheckpointError
from llmtune.storage import layout
from llmtune.storage.plain_json import parse_json
from llmtune.storage.signature import Signer, with_sha256

#: Files of a published folder that the manifest does not list.
_OWN = {layout.MANIFEST, layout.SIGNATURE, layout.COMPLETE}

_HASHING_THREADS = 4


def hash_file(path: Path) -> dict[str, Any]:
    """Size in bytes and xxh3-128 of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"size": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def write_manifest(
    folder: Path,
    files: dict[str, dict[str, Any]],
    about: dict[str, Any],
    signer: Signer | None = None,
) -> None:
    """``manifest.json``: files with size and hash, and what ``about`` says of their origin.

    Args:
        signer: Signs it; every file is read once more for its SHA-256.
    """
    if signer is not None:
        files = with_sha256(folder, files)
    manifest = {"llmtune_version": __version__, **about, "files": dict(sorted(files.items()))}
    text = json.dumps(manifest, indent=1).encode()
    written = {layout.MANIFEST: text} | (
        {layout.SIGNATURE: signer.sign(text)} if signer is not None else {}
    )
    # One that is left of another manifest would be wrong.
    (folder / layout.SIGNATURE).unlink(missing_ok=True)
    for name, data in written.items():
        (folder / name).write_bytes(data)
        flush(folder / name)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete folder, with the presence, size and place of every file checked.

    Raises:
        CheckpointError: The folder is incomplete, the manifest is broken, or a file is not as it
            says.
    """
    manifest, problems = _look(folder)
    if problems:
        raise CheckpointError(f"{folder}: {'; '.join(problems)}")
    return manifest


def find_damage(folder: Path, left_out: Callable[[str], bool] = lambda _: False) -> list[str]:
    """Everything that is not as the manifest says; empty for a folder that is whole.

    Args:
        left_out: Files that nobody is going to open, of which only presence and size are checked.
    """
    manifest, problems = _look(folder)
    named = {problem.split(" ", 1)[0] for problem in problems}
    files = manifest.get("files", {}).items()
    entries = [(name, entry) for name, entry in files if name not in named and not left_out(name)]

    def find_problem(item: tuple[str, dict[str, Any]]) -> str | None:
        name, entry = item
        try:
            found = hash_file(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found["xxh3_128"] != entry["xxh3_128"]:
            return f"{name} has other contents than it was written with (xxh3 {found['xxh3_128']})"
        return None

    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        return problems + [problem for problem in pool.map(find_problem, entries) if problem]


def check_undamaged(folder: Path, left_out: Callable[[str], bool] = lambda _: False) -> None:
    """Read what is going to be opened of a published folder; see :func:`find_damage`.

    Raises:
        CheckpointError: With all that is wrong.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    problems = find_damage(folder, left_out)
    if problems:
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems)}")


def publish(aside: Path, folder: Path) -> None:
    """Rename a finished folder into place and mark it complete; its parent is flushed, so that the
    name survives too.
    """
    flush(aside)
    aside.rename(folder)
    mark_complete(folder)
    flush(folder.parent)


def mark_complete(folder: Path) -> None:
    """Write the marker, with the manifest's hash in it."""
    marker = folder / layout.COMPLETE
    marker.write_text(str(hash_file(folder / layout.MANIFEST)["xxh3_128"]))
    flush(marker)
    flush(folder)


def flush(path: Path) -> None:
    """``fsync`` of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _look(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The manifest, and what is wrong without reading the files it lists."""
    marker = folder / layout.COMPLETE
    if not marker.is_file():
        return {}, [f"{layout.COMPLETE} is missing: it was never finished"]
    try:
        text = (folder / layout.MANIFEST).read_bytes()
        manifest: dict[str, Any] = parse_json(text)
        files = {
            str(name): (int(entry["size"]), str(entry["xxh3_128"]))
            for name, entry in manifest["files"].items()
        }
        expected = marker.read_text(errors="replace")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        return {}, [f"{layout.MANIFEST} cannot be read ({error})"]
    if expected != xxhash.xxh3_128(text).hexdigest():
        return {}, [f"{layout.MANIFEST} is not the one that {layout.COMPLETE} was written for"]
    problems = [
        problem for name, (size, _) in files.items() if (problem := _look_at(folder, name, size))
    ]
    present = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()
    }
    problems += [
        f"{name} is not in {layout.MANIFEST}" for name in sorted(present - files.keys() - _OWN)
    ]
    return manifest, problems


def _look_at(folder: Path, name: str, size: int) -> str | None:
    """What is wrong with a file that a manifest lists, without reading it."""
    path = folder / name
    try:
        if not _stays_inside(name, path):
            return f"{name} leads out of the folder"
        if not path.is_file():
            return f"{name} is missing"
        found = path.stat().st_size
    except OSError as error:
        # A name that is too long for any file, for one.
        return f"{name} cannot be there ({error.strerror})"
    return None if found == size else f"{name} has {found} bytes instead of {size}"


def _stays_inside(name: str, path: Path) -> bool:
    """Whether a manifest's path is one of its folder, and no link."""
    pure = PurePosixPath(name)
    return not pure.is_absolute() and ".." not in pure.parts and not path.is_symlink()

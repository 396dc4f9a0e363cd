"""Publish a folder with a manifest of its files, and check a published one against it.

The manifest lists every file with its size and hash, and is written before the folder gets its
name. The marker, which is written last, holds the hash of the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from llmtune import __version__
from llmtune.errors import CheckpointError
from llmtune.storage import layout
from llmtune.storage.atomic import replace_folder, write_atomically
from llmtune.storage.hashing import hash_bytes, hash_file
from llmtune.storage.plain_json import parse_json
from llmtune.storage.signature import Signer, add_sha256

#: The format of what llmtune publishes. A number that is higher than this is refused; a manifest
#: without one, of llmtune 0.1.0, has the first.
FORMAT_VERSION = 1

#: Files of a published folder that the manifest does not list.
_OWN = {layout.MANIFEST, layout.SIGNATURE, layout.COMPLETE}

_HASHING_THREADS = 4


def write_manifest(
    folder: Path,
    files: dict[str, dict[str, Any]],
    about: dict[str, Any],
    signer: Signer | None = None,
) -> None:
    """Write ``manifest.json``, flushed, and its signature.

    Args:
        files: Size and hash of each, by its path in the folder.
        about: Further values of the manifest, such as what the files were made from.
        signer: Signs it; every file is read once more for its SHA-256.
    """
    if signer is not None:
        files = add_sha256(folder, files)
    versions = {"format_version": FORMAT_VERSION, "llmtune_version": __version__}
    manifest = {**versions, **about, "files": dict(sorted(files.items()))}
    text = json.dumps(manifest, indent=1).encode()
    written = {layout.MANIFEST: text}
    if signer is not None:
        written[layout.SIGNATURE] = signer.sign(text)
    # A signature of an earlier manifest would be wrong.
    (folder / layout.SIGNATURE).unlink(missing_ok=True)
    for name, data in written.items():
        write_atomically(folder / name, data)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a complete folder, and check presence and size of its files.

    Raises:
        CheckpointError: The folder is incomplete, the manifest is broken, or a file differs from
            it.
    """
    manifest, problems = _read_checked(folder)
    if problems:
        raise CheckpointError(f"{folder}: {'; '.join(problems)}")
    return manifest


def find_damage(folder: Path, left_out: Callable[[str], bool] = lambda _: False) -> list[str]:
    """Compare a folder with its manifest; return every difference, none if it is intact.

    Args:
        left_out: Tells which files are not read, but checked for presence and size only.
    """
    manifest, problems = _read_checked(folder)
    named = {problem.split(" ", 1)[0] for problem in problems}
    files = manifest.get("files", {}).items()
    entries = [(name, entry) for name, entry in files if name not in named and not left_out(name)]

    def compare(item: tuple[str, dict[str, Any]]) -> str | None:
        name, entry = item
        try:
            actual = hash_file(folder / name)["xxh3_128"]
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if actual != entry["xxh3_128"]:
            return f"{name} has other contents than it was written with (xxh3 {actual})"
        return None

    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        return problems + [problem for problem in pool.map(compare, entries) if problem]


def check_undamaged(folder: Path, left_out: Callable[[str], bool] = lambda _: False) -> None:
    """Refuse a published folder that differs from its manifest; see :func:`find_damage`.

    Raises:
        CheckpointError: It is missing or damaged, with every difference.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    problems = find_damage(folder, left_out)
    if problems:
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems)}")


def is_complete(folder: Path) -> bool:
    """Tell whether a folder was published."""
    return (folder / layout.COMPLETE).is_file()


def publish(aside: Path, folder: Path) -> None:
    """Give a finished folder its name and mark it complete, in the place of an older one.

    Raises:
        OSError: The disk refused.
    """
    replace_folder(aside, folder, is_complete, seal=mark_complete)


def mark_complete(folder: Path) -> None:
    """Write the marker, with the manifest's hash in it, flushed."""
    manifest = (folder / layout.MANIFEST).read_bytes()
    write_atomically(folder / layout.COMPLETE, hash_bytes(manifest))


def _read_checked(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Read the manifest; return it, and the problems that show without reading the files."""
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
    if expected != hash_bytes(text):
        return {}, [f"{layout.MANIFEST} is not the one that {layout.COMPLETE} was written for"]
    found = manifest.get("format_version", FORMAT_VERSION)
    if not isinstance(found, int) or found > FORMAT_VERSION:
        return {}, [
            f"{layout.MANIFEST} has the format {found!r} of llmtune"
            f" {manifest.get('llmtune_version')}, and this llmtune {__version__} reads formats up"
            f" to {FORMAT_VERSION}: install that version"
        ]
    checked = (_find_file_problem(folder, name, size) for name, (size, _) in files.items())
    problems = [problem for problem in checked if problem]
    present = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()
    }
    problems += [
        f"{name} is not in {layout.MANIFEST}" for name in sorted(present - files.keys() - _OWN)
    ]
    return manifest, problems


def _find_file_problem(folder: Path, name: str, size: int) -> str | None:
    path = folder / name
    try:
        if not _stays_inside(name, path):
            return f"{name} leads out of the folder"
        if not path.is_file():
            return f"{name} is missing"
        actual = path.stat().st_size
    except OSError as error:
        # The name may be too long for any file, for example.
        return f"{name} cannot be there ({error.strerror})"
    return None if actual == size else f"{name} has {actual} bytes instead of {size}"


def _stays_inside(name: str, path: Path) -> bool:
    """Tell whether a path in a manifest stays in its folder, and is no link."""
    pure = PurePosixPath(name)
    return not pure.is_absolute() and ".." not in pure.parts and not path.is_symlink()

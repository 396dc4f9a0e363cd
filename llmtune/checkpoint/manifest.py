"""What a published folder holds: every file with its size and hash, written before the folder is renamed into place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import xxhash

from llmtune import __version__
from llmtune.checkpoint import names
from llmtune.errors import CheckpointError


def hash_file(path: Path) -> dict[str, Any]:
    """Size in bytes and xxh3-128 of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"size": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def write_manifest(folder: Path, files: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
    """``manifest.json``: files with size and hash, and what ``about`` says of their origin."""
    manifest = {"llmtune_version": __version__, **about, "files": dict(sorted(files.items()))}
    path = folder / names.MANIFEST
    path.write_text(json.dumps(manifest, indent=1))
    flush(path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with every file's presence and size checked.

    Raises:
        CheckpointError: The manifest is missing or broken, or a file is not as it says.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / names.MANIFEST).read_text())
        files = manifest["files"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{folder}: {names.MANIFEST} cannot be read ({error})") from error
    for name, entry in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["size"]:
            state = "is missing" if size is None else f"has {size} bytes instead of {entry['size']}"
            raise CheckpointError(f"{folder}: {name} {state}; name another checkpoint with resume_from_checkpoint=PATH")
    return manifest


def publish(aside: Path, folder: Path) -> None:
    """Rename a finished folder into place and mark it complete; its parent is flushed, so that the name survives too."""
    flush(aside)
    aside.rename(folder)
    (folder / names.COMPLETE).write_text("")
    flush(folder / names.COMPLETE)
    flush(folder)
    flush(folder.parent)


def flush(path: Path) -> None:
    """``fsync`` of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

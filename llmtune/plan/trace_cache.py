"""Traces on disk: a second plan of the same model needs none, and none of what tracing imports."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from importlib import metadata
from pathlib import Path

from llmtune import __version__

#: What a trace depends on beside model and settings.
_LIBRARIES = ("torch", "transformers")


def read_trace(folder: Path | None, key: str) -> dict[str, int] | None:
    """The values stored under a key, or None."""
    if folder is None:
        return None
    try:
        values: dict[str, int] = json.loads(_file(folder, key).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return values


def write_trace(folder: Path | None, key: str, values: dict[str, int]) -> None:
    """Store them; a cache that cannot be written is no reason to stop."""
    if folder is None:
        return
    file = _file(folder, key)
    aside = file.with_suffix(f".{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(values))
        aside.rename(file)


def _file(folder: Path, key: str) -> Path:
    versions = [__version__, *(metadata.version(name) for name in _LIBRARIES)]
    digest = hashlib.sha256(repr((versions, key)).encode()).hexdigest()[:24]
    return folder / "traces" / f"{digest}.json"

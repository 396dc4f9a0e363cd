"""Cache a model's shape and traces on disk, so that a second plan neither builds nor traces it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from llmtune import __version__
from llmtune.registry import hash_plugins

#: What the values depend on beside model and settings: libraries, and the files that compute them.
_LIBRARIES = ("torch", "transformers")
_SOURCES = ("activations.py", "model_shape.py", "../abilities.py")
_TUNERS = "../../tuner"


def read_cached(folder: Path | None, kind: str, key: str) -> Any:
    """Read the values stored under a key; None if there are none.

    Args:
        kind: Kind of the values, a folder of the cache: ``traces`` or ``shapes``.
    """
    if folder is None:
        return None
    try:
        return json.loads(_file(folder, kind, key).read_text())
    except (OSError, json.JSONDecodeError):
        return None


def write_cached(folder: Path | None, kind: str, key: str, values: Any) -> None:
    """Store values as JSON; a cache that cannot be written must not stop the plan."""
    if folder is None:
        return
    file = _file(folder, kind, key)
    aside = file.with_suffix(f".{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(values))
        aside.rename(file)


def _file(folder: Path, kind: str, key: str) -> Path:
    # The code of a user's own tuner may change.
    digest = hashlib.sha256(repr((_versions(), hash_plugins(), key)).encode()).hexdigest()[:24]
    return folder / kind / f"{digest}.json"


@cache
def _versions() -> tuple[str, ...]:
    folder = Path(__file__).parent
    files = [folder / name for name in _SOURCES]
    files += sorted((folder / _TUNERS).rglob("*.py"))
    sources = (hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return (__version__, *(metadata.version(name) for name in _LIBRARIES), *sources)

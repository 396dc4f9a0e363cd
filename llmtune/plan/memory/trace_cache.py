"""Cache a model's shape and traces on disk, so that a second plan neither builds nor traces it."""

import contextlib
import json
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from llmtune import __version__
from llmtune.registry import hash_plugins
from llmtune.storage.atomic import write_cache_file
from llmtune.storage.hashing import sha256_bytes, sha256_files

#: Dependencies of the values beside model and settings: libraries, and the files that compute them.
_LIBRARIES = ("torch", "transformers")
_SOURCES = (
    "model_shape.py",
    "rank_bytes.py",
    "shapes.py",
    "tensor_shapes.py",
    "../abilities.py",
    "../../varlen_attention.py",
)
_ROOMS = ("trace", "../architecture", "../../task", "../../tuner")


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
    with contextlib.suppress(OSError):
        write_cache_file(_file(folder, kind, key), json.dumps(values))


def _file(folder: Path, kind: str, key: str) -> Path:
    # A plug-in's tuner may train something else tomorrow.
    digest = sha256_bytes(repr((_versions(), hash_plugins(), key)).encode())[:24]
    return folder / kind / f"{digest}.json"


@cache
def _versions() -> tuple[str, ...]:
    here = Path(__file__).parent
    files = [here / name for name in _SOURCES]
    for room in _ROOMS:
        files += sorted((here / room).rglob("*.py"))
    return (__version__, *(metadata.version(name) for name in _LIBRARIES), sha256_files(files))

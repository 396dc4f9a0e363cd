"""A model folder of another's files: linked, or copied where the disk cannot link them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtune.config.cache_folder import KEY
from llmtune.model.weights.files import read_entries, weight_files
from llmtune.storage.atomic import link_or_copy
from llmtune.storage.layout import MODEL_INDEX
from llmtune.units import format_bytes

#: The beginning of the names of the base's weight files.
_BASE = "base-"

_CONFIG = "config.json"


def link_base(
    base: Path, folder: Path, settings: dict[str, Any], say: Callable[[str], None]
) -> None:
    """Link a base's files into a new folder, and write its configuration and an index of weights.

    Args:
        settings: The whole of the new ``config.json``.
        say: Told if weights had to be copied.
    """
    folder.mkdir()
    weights = weight_files(base)
    # Not symbolic links: a folder with links that lead out of it is not merged or exported.
    copied = [file for file in weights if not link_or_copy(file, folder / f"{_BASE}{file.name}")]
    if copied:
        size = format_bytes(sum(file.stat().st_size for file in copied))
        say(
            f"copied {size} of {base}, which cannot be linked into {folder.parent}: a cache on the"
            f" same file system, with files of your own, needs no copy ({KEY})"
        )
    for file in base.iterdir():
        is_weight = file.suffix in (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".onnx")
        if file.is_file() and not is_weight and file.name not in (_CONFIG, MODEL_INDEX):
            link_or_copy(file, folder / file.name)
    (folder / _CONFIG).write_text(json.dumps(settings, indent=2, ensure_ascii=False))
    entries = read_entries(base)
    write_index(folder, {name: f"{_BASE}{entry.file.name}" for name, entry in entries.items()})


def write_index(folder: Path, files: dict[str, str]) -> None:
    """Write the index of a folder's weights.

    Args:
        files: Tensor -> name of its file.
    """
    text = json.dumps({"metadata": {}, "weight_map": dict(sorted(files.items()))}, indent=1)
    (folder / MODEL_INDEX).write_text(text)

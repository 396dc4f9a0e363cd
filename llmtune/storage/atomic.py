"""Small files that are there whole or not at all, whatever ends the process or fills the disk in
the middle.

Every folder may import this.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llmtune.storage.plain_json import parse_json


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a small file, flushed, under its name only when it is whole; what stood there stays
    until then.

    Raises:
        OSError: The disk refused.
    """
    # Hidden: a folder that holds nothing else yet counts as empty.
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """What a small file holds; None where there is none, and of one that was cut off, as a crash of
    the machine leaves it.
    """
    try:
        return parse_json(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None

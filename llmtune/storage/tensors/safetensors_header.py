"""Read the header of a safetensors file: type, shape and offset of each tensor.

The format (https://github.com/huggingface/safetensors#format): an 8-byte little-endian length, then
JSON of that length, then the data. A header that reaches beyond the file is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.storage.plain_json import parse_json

#: As the library's own limit.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor of a file."""

    kind: str
    """Its type, as safetensors calls it; see :data:`llmtune.storage.tensors.dtypes.TYPES`."""
    shape: tuple[int, ...]
    start: int
    """Offset of its data in the file, in bytes."""


def read_header(file: Path) -> dict[str, HeaderEntry]:
    """Read the entries of all tensors of a file, by name, in the file's order.

    Raises:
        ValueError: It is no complete safetensors file.
        OSError: It cannot be read.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = parse_json(handle.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return {
        name: _to_entry(name, about, 8 + length, size)
        for name, about in header.items()
        if name != "__metadata__"
    }


def _to_entry(name: str, about: Any, first: int, size: int) -> HeaderEntry:
    values: dict[str, Any] = about if isinstance(about, dict) else {}
    kind: Any = values.get("dtype")
    shape: Any = values.get("shape")
    offsets: Any = values.get("data_offsets")
    has_offsets = _are_counts(offsets) and len(offsets) == 2
    if not isinstance(kind, str) or not _are_counts(shape) or not has_offsets:
        raise ValueError(f"{name[:80]!r} has no type, shape and place")
    start, end = offsets
    if not start <= end <= size - first:
        raise ValueError(f"{name[:80]!r} is at bytes {start} to {end} of {size - first}")
    return HeaderEntry(kind, tuple(shape), first + start)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

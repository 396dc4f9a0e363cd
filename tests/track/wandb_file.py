"""Read the file of a run that W&B tracked offline.

It is a log of LevelDB (github.com/google/leveldb, doc/log_format.md) behind a header of 7 bytes,
with W&B's own protocol buffers as records.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK, _HEADER = 32768, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_wandb(file: Path) -> Iterator[Any]:
    """Yield the records of a ``.wandb`` file."""
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    place, parts = _HEADER, b""
    while place + _HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part = data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        parts = part if kind in (_FULL, _FIRST) else parts + part
        if kind in (_FULL, _LAST):
            message: Any = wandb_internal_pb2
            record = message.Record()
            record.ParseFromString(parts)
            yield record


def read_histories(file: Path) -> dict[int, dict[str, Any]]:
    """Return the logged values by step."""
    found: dict[int, dict[str, Any]] = {}
    for record in read_wandb(file):
        if record.WhichOneof("record_type") == "history":
            values = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            found.setdefault(values["_step"], {}).update(values)
    return found

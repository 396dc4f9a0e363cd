"""Files as ``torch.save`` writes them, around a pickle that is made by hand."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch


class _Tensor:
    """Stands for a tensor that says of itself what it likes."""

    def __init__(self, offset: Any, shape: Any, stride: Any, numel: Any, key: Any = "0"):
        self.storage = ("storage", torch.FloatStorage, key, "cpu", numel)
        self.arguments: tuple[Any, ...] = (offset, shape, stride, False, {})


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value[1] if isinstance(value, tuple) and value[:1] == ("persistent",) else None

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, _Tensor):
            return torch._utils._rebuild_tensor_v2, (
                ("persistent", value.storage),
                *value.arguments,
            )
        return NotImplemented


def tensor(shape: Any, stride: Any, numel: Any = 4, offset: Any = 0, key: Any = "0") -> Any:
    """A tensor of an archive."""
    return _Tensor(offset, shape, stride, numel, key)


def write_archive(
    file: Path, value: Any, storage: bytes = b"\0" * 16, data: bytes | None = None
) -> Path:
    """A file with a pickle of the value, or with ``data`` for one, and one storage."""
    out = io.BytesIO()
    _Pickler(out, protocol=2).dump(value)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", out.getvalue() if data is None else data)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", storage)
    return file

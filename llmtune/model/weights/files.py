"""Read the safetensors files of a model folder: their headers, and single tensors or slices."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.errors import MissingPrerequisiteError
from llmtune.storage.hashing import sha256_bytes
from llmtune.storage.layout import MODEL_INDEX, MODEL_WEIGHTS
from llmtune.storage.plain_json import parse_json
from llmtune.storage.tensors.dtypes import TYPES, to_torch
from llmtune.storage.tensors.safetensors_header import read_header

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor in a safetensors file."""

    file: Path
    kind: str
    """Its type, by safetensors' name."""
    shape: tuple[int, ...]
    offset: int
    """Byte of the file where its data begin."""

    @property
    def dtype(self) -> torch.dtype:
        """Its type in torch."""
        return to_torch(self.kind)


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files that transformers reads of a model folder.

    Some folders hold a second copy under other names.

    Raises:
        MissingPrerequisiteError: There are none, or the index names one that is missing.
    """
    if (folder / MODEL_WEIGHTS).is_file():
        return [folder / MODEL_WEIGHTS]
    index = folder / MODEL_INDEX
    if not index.is_file():
        others = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:8])
        raise MissingPrerequisiteError(
            f"{folder} holds neither {MODEL_WEIGHTS} nor {MODEL_INDEX}, which transformers reads"
            f" (it has: {others or 'no *.safetensors'}); save the model with transformers'"
            " save_pretrained"
        )
    try:
        names = sorted(set(parse_json(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MissingPrerequisiteError(
            f"{index} is not an index of safetensors ({error}); fetch it again"
        ) from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = " and more" if len(missing) > 4 else ""
        raise MissingPrerequisiteError(
            f"{folder}: {MODEL_INDEX} names {', '.join(missing[:4])}{more}, which"
            f" {'is' if len(missing) == 1 else 'are'} not there; fetch the model again"
        )
    return [folder / name for name in names]


def read_entries(folder: Path) -> dict[str, Entry]:
    """Read the entry of every tensor of a model folder, from the headers alone.

    The layout is that of safetensors: an 8-byte little-endian header length, a JSON header, the
    data.

    Raises:
        MissingPrerequisiteError: A file is missing, or is not a complete safetensors file.
    """
    entries: dict[str, Entry] = {}
    for file in weight_files(folder):
        try:
            header = read_header(file)
        except ValueError as error:
            raise MissingPrerequisiteError(
                f"{file}: no whole safetensors file (cut off, or a pointer of Git LFS: run git lfs"
                f" pull in its folder; {error})"
            ) from error
        for name, about in header.items():
            if about.kind in TYPES:
                entries[name] = Entry(
                    file=file, kind=about.kind, shape=about.shape, offset=about.start
                )
    return entries


def read_tensor(entry: Entry) -> torch.Tensor:
    """Read one tensor, on the host."""
    return read_slice(entry, 0, math.prod(entry.shape)).view(entry.shape)


def read_slice(entry: Entry, start: int, count: int) -> torch.Tensor:
    """Read elements of the flattened tensor, on the host. Shape (count,).

    Raises:
        MissingPrerequisiteError: The file ends before them.
    """
    import torch

    width = entry.dtype.itemsize
    if not count:
        return torch.empty(0, dtype=entry.dtype)
    buffer = bytearray(count * width)
    with entry.file.open("rb", buffering=0) as handle:
        view = memoryview(buffer)
        done = 0
        while done < len(buffer):
            count_read = os.preadv(
                handle.fileno(), [view[done:]], entry.offset + start * width + done
            )
            if not count_read:
                raise MissingPrerequisiteError(
                    f"{entry.file} ended while it was read; fetch the model again"
                )
            done += count_read
    return torch.frombuffer(buffer, dtype=entry.dtype)


def identify_weights(folder: Path) -> str:
    """Hash what a report depends on.

    That is the configuration, and every tensor's name, type, shape, file, file size and time.
    """
    parts = [(folder / "config.json").read_bytes()]
    for name, entry in sorted(read_entries(folder).items()):
        status = entry.file.stat()
        parts.append(
            f"{name} {entry.kind} {entry.shape} {entry.file.name} {status.st_size}"
            f" {status.st_mtime_ns}".encode()
        )
    return sha256_bytes(b"".join(parts))

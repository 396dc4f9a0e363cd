"""Write safetensors files tensor by tensor: a header from names, dtypes and shapes, then the data.

The format (https://github.com/huggingface/safetensors#format): an 8-byte little-endian header
length, a JSON header padded with spaces to 8 bytes, the tensors' bytes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from llmtune.storage.hashing import FileHash
from llmtune.storage.layout import MODEL_INDEX, MODEL_WEIGHTS
from llmtune.storage.tensors.dtypes import to_safetensors
from llmtune.storage.tensors.tensor_spec import TensorSpec

#: Bytes written and hashed at once.
_BLOCK = 1 << 24


class TensorFile:
    """A safetensors file that is being written, and hashed on the way.

    Tensors are written in the order of the specs, whole or a few rows at a time.
    """

    def __init__(
        self, path: Path, specs: Iterable[TensorSpec], metadata: dict[str, str] | None = None
    ):
        self.path = path
        self.specs = list(specs)
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        offset = 0
        for spec in self.specs:
            kind = to_safetensors(spec.dtype)
            assert kind is not None, f"{spec.name}: {spec.dtype} is not written"
            header[spec.name] = {
                "dtype": kind,
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._expected = 8 + len(text) + offset
        self._hash = FileHash()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._append(struct.pack("<Q", len(text)) + text)

    def write(self, tensor: torch.Tensor) -> None:
        """Append a tensor, or the next rows of one."""
        data = tensor.detach().cpu().contiguous().reshape(-1)
        self._append(data.view(torch.uint8).numpy().data)

    @property
    def entry(self) -> dict[str, Any]:
        """Return size and hash of what was written, as a manifest lists them."""
        return self._hash.entry

    def _append(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            # Both release the interpreter's lock, so that the main thread trains meanwhile.
            written = os.write(self._file, view[:_BLOCK])
            self._hash.update(view[:written])
            view = view[written:]

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Flush to the disk; a file of another length than its header says is a bug."""
        try:
            if kind is None:
                os.fsync(self._file)
        finally:
            os.close(self._file)
        if kind is None:
            assert self._hash.size == self._expected, (
                f"{self.path}: {self._hash.size} bytes written, {self._expected} announced"
            )


def plan_shards(
    specs: list[TensorSpec], max_shard_bytes: int
) -> list[tuple[str, list[TensorSpec]]]:
    """Divide tensors among files named as transformers names them; a tensor is never split."""
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(s.nbytes for s in shards[-1]) + spec.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    if len(shards) == 1:
        return [(MODEL_WEIGHTS, shards[0])]
    count = len(shards)
    return [
        (f"model-{number:05d}-of-{count:05d}.safetensors", shard)
        for number, shard in enumerate(shards, start=1)
    ]


def write_index(folder: Path, shards: list[tuple[str, list[TensorSpec]]]) -> None:
    """Write ``model.safetensors.index.json`` where there is more than one file."""
    if len(shards) > 1:
        (folder / MODEL_INDEX).write_text(describe_shards(shards))


def describe_shards(shards: list[tuple[str, list[TensorSpec]]]) -> str:
    """Return the text of the index: the total size, and the file of each tensor."""
    total = sum(spec.nbytes for _, specs in shards for spec in specs)
    weight_map = {spec.name: name for name, specs in shards for spec in specs}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)

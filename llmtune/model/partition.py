"""Partition-direct loading: under ZeRO 3 a rank reads the bytes of its own slices, and nothing is gathered or sent.

A ZeRO-3 partition is a contiguous slice of the flattened tensor: rank ``r`` of ``w`` owns the elements
``[r*P, (r+1)*P)`` with ``P = ceil(n / w)``, padded on the last rank. A safetensors entry is the flattened tensor too,
so the slice is one read at a computed offset.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtune.errors import MissingPrerequisiteError

#: safetensors dtype names of floating tensors.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in a safetensors file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Byte of the file where its data begins."""


def read_entries(folder: Path) -> dict[str, Entry]:
    """Every floating tensor of a model folder, from the headers alone.

    The layout is that of safetensors: an 8-byte little-endian header length, a JSON header, the data.
    """
    entries: dict[str, Entry] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header: dict[str, Any] = json.loads(handle.read(length))
        for name, entry in header.items():
            if name != "__metadata__" and entry["dtype"] in DTYPES:
                start = 8 + length + entry["data_offsets"][0]
                entries[name] = Entry(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    return entries


def load_partitions(model: Any, folder: Path, rank: int) -> None:
    """Fill this rank's slice of every parameter that ``zero.Init`` made.

    Raises:
        MissingPrerequisiteError: The files do not hold exactly the model's parameters.
    """
    entries = read_entries(folder)
    problems = []
    for name, parameter in model.named_parameters():
        entry = entries.get(name)
        if entry is None:
            problems.append(f"{name} is not in the files")
        elif entry.shape != tuple(parameter.ds_shape):
            problems.append(f"{name} is {entry.shape} in the files and {tuple(parameter.ds_shape)} in the model")
        else:
            _load_slice(parameter, entry, rank)
    if problems:
        raise MissingPrerequisiteError(
            f"{folder} cannot be loaded under ZeRO 3: {'; '.join(problems[:4])}"
            f"{f' and {len(problems) - 4} more' if len(problems) > 4 else ''}. Its weights are stored under other names "
            "than the model's; save it once with transformers' save_pretrained, or take zero=2"
        )


def _load_slice(parameter: Any, entry: Entry, rank: int) -> None:
    swapper = parameter.nvme_swapper
    swapped = swapper is not None and swapper.swappable_tensor(parameter)
    if swapped:
        # A slice on NVMe comes into one of the swapper's buffers, is filled, and goes back.
        swapper.swap_in([parameter], async_op=False)
    partition = parameter.ds_tensor
    _fill(partition, parameter.ds_numel, entry, rank)
    if swapped:
        swapper.swap_out_and_release([parameter])
    # hpZ keeps a second slice, for gathers within a node. ``zero.Init`` cut it from memory that nobody had written; it is cut
    # anew from the weights when they are first gathered and given back.
    if getattr(parameter, "ds_secondary_tensor", None) is not None:
        parameter.ds_secondary_tensor = None


def _fill(partition: Any, numel: int, entry: Entry, rank: int) -> None:
    size = partition.numel()
    start = rank * size
    count = max(0, min(size, numel - start))
    target = partition.data.view(-1)
    if count < size:
        target[count:].zero_()
    if count == 0:
        return
    width = entry.dtype.itemsize
    buffer = bytearray(count * width)
    with entry.file.open("rb", buffering=0) as handle:
        view = memoryview(buffer)
        done = 0
        while done < len(buffer):
            done += os.preadv(handle.fileno(), [view[done:]], entry.offset + start * width + done)
    target[:count].copy_(torch.frombuffer(buffer, dtype=entry.dtype))


def restore_buffers(model: Any) -> None:
    """Compute rotary frequencies again in fp32: ``zero.Init`` casts every float tensor made inside it to the training dtype."""
    for module in model.modules():
        names = [
            name for name in getattr(module, "_non_persistent_buffers_set", ()) if module._buffers.get(name) is not None
        ]
        floating = [name for name in names if module._buffers[name].is_floating_point()]
        for name in floating:
            module._buffers[name] = module._buffers[name].float()
        if floating:
            model._init_weights(module)

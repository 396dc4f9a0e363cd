"""Partition-direct loading: a ZeRO-3 rank reads its own slices, and no weight is sent.

A ZeRO-3 partition is a contiguous slice of the flattened tensor: rank ``r`` of ``w`` owns the
elements ``[r*P, (r+1)*P)`` with ``P = ceil(n / w)``, padded on the last rank. A safetensors entry
is the flattened tensor too, so the slice is one read at a computed offset. Only tensors that
transformers computes from several of the files, such as stacked experts, are made complete first,
one after the other.

A weight that is kept in 4 bits is quantized while its slice is read
(:mod:`llmtune.model.nf4.nf4_slices`). Such models are read here under the other stages too,
where the slice is all of the tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmtune.errors import MissingPrerequisiteError
from llmtune.model.weights.files import Entry, read_entries, read_slice, read_tensor
from llmtune.model.weights.names import Conversion, find_missing, match_names
from llmtune.model.weights.partition_edit import is_partitioned, open_slice

#: Reads elements of a flattened tensor, by the first index and the count.
Read = Callable[[int, int], torch.Tensor]

#: Reads a whole weight from the model's files again, in the shape that the model's layer has.
ReadAgain = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A parameter that does not hold a weight as the files do."""

    stored_shape: tuple[int, ...]
    """Shape of the weight in the files."""
    transposed: bool
    """The rows in the files are columns of the weight."""
    pack: Callable[[Read], Read]
    """Turns the function that reads the weight into one that reads the parameter.

    The latter is called on every rank, also for no element.
    """
    remember: Callable[[ReadAgain], None]
    """Is given the function that reads the weight another time."""


def load_partitions(
    model: Any, folder: Path, rank: int, packed: Mapping[str, PackedWeight] | None = None
) -> None:
    """Fill this rank's slice of every parameter, or all of it without ZeRO 3; and stored buffers.

    Args:
        packed: Name of a parameter -> how its weight is packed.

    Raises:
        MissingPrerequisiteError: The files lack a parameter, or hold it in another shape.
    """
    entries = read_entries(folder)
    matching = match_names(model, entries)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers())
    packed = packed or {}
    done: set[int] = set()
    problems = []
    for name, source in matching.direct.items():
        entry, parameter = entries[source], parameters.get(name)
        shape = _shape_in_files(name, buffers[name] if parameter is None else parameter, packed)
        if entry.shape != shape:
            problems.append(f"{name} is {entry.shape} in the files and {shape} in the model")
        elif parameter is None:
            buffers[name].data.copy_(read_tensor(entry))
        elif id(parameter) not in done:
            read: Read = partial(read_slice, entry)
            if name in packed:
                again = partial(_read_again, partial(read_tensor, entry), packed[name].transposed)
                packed[name].remember(again)
                if packed[name].transposed:
                    read = partial(read_flat, again().reshape(-1))
                read = packed[name].pack(read)
            load_slice(parameter, read, rank)
            done.add(id(parameter))
    stored = set(matching.direct)
    for conversion in matching.conversions:
        stored |= _load_converted(model, conversion, entries, rank, packed)
    problems += [f"{name} is not in the files" for name in find_missing(model, stored)[0]]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise MissingPrerequisiteError(
            f"{folder} cannot be loaded: {'; '.join(problems[:4])}{more}; fetch the model again"
        )


def _shape_in_files(name: str, tensor: Any, packed: Mapping[str, PackedWeight]) -> tuple[int, ...]:
    if name in packed:
        return packed[name].stored_shape
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _load_converted(
    model: Any,
    conversion: Conversion,
    entries: dict[str, Entry],
    rank: int,
    packed: Mapping[str, PackedWeight],
) -> set[str]:
    """Compute parameters as transformers does, and keep this rank's slices; return their names."""

    def convert() -> dict[str, torch.Tensor]:
        return conversion.run(model, lambda name: read_tensor(entries[name]))

    made = convert()
    for name, tensor in made.items():
        parameter = model.get_parameter(name)
        shape = _shape_in_files(name, parameter, packed)
        if tuple(tensor.shape) != shape:
            raise MissingPrerequisiteError(
                f"{name} is {tuple(tensor.shape)} as the files have it and {shape} in the model"
            )
        weight = tensor.T if name in packed and packed[name].transposed else tensor
        read: Read = partial(read_flat, weight.reshape(-1))
        if name in packed:
            once_more = partial(_take_from, convert, name)
            packed[name].remember(partial(_read_again, once_more, packed[name].transposed))
            read = packed[name].pack(read)
        load_slice(parameter, read, rank)
    return set(made)


def _take_from(convert: Callable[[], dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    return convert()[name]


def _read_again(read: Callable[[], torch.Tensor], transposed: bool) -> torch.Tensor:
    """Read a weight as the layer has it, of which the files may hold the transposed."""
    return read().T if transposed else read()


def read_flat(flat: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Return elements of a flattened tensor. Shape (count,)."""
    return flat[start : start + count]


def load_slice(parameter: Any, read: Read, rank: int) -> None:
    """Fill this rank's slice of a parameter; all of it, where ZeRO has not partitioned it."""
    if not is_partitioned(parameter):
        parameter.data.view(-1).copy_(read(0, parameter.numel()))
        return
    with open_slice(parameter, rank) as (target, start, count):
        target[count:].zero_()
        # Also for no element: ranks may read together.
        target[:count].copy_(read(start, count))


def restore_buffers(model: Any, build: Callable[[torch.dtype], Any], dtype: torch.dtype) -> None:
    """Give a partitioned model an unpartitioned one's buffers, such as fp32 rotary frequencies.

    ``zero.Init`` casts every float tensor that is made inside it to the training dtype. An
    unpartitioned model has buffers that are computed in fp32, and then have the dtype in which the
    architecture makes them.

    DeepSpeed 0.19.8's ``data_types.keep_in_fp32_modules`` (``runtime/keep_in_fp32.py``) does not
    replace this. By itself it knows only the buffers that transformers names for fp32, and rotary
    frequencies are not among them. Buffers that are named to it become fp32 after they were rounded
    (``Init._keep_in_fp32`` of ``zero/partition_parameters.py`` runs when the module is built):
    ``inv_freq`` of a Llama in bf16 is fp32 then, and off by up to 0.4 %.

    Args:
        build: Makes the same model again in a dtype, outside of ``zero.Init``.
        dtype: The training dtype.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        values = dict(build(torch.float32).named_buffers())
    with torch.device("meta"):
        dtypes = {name: buffer.dtype for name, buffer in build(dtype).named_buffers()}
    kept = [re.compile(pattern) for pattern in model._get_dtype_plan(dtype)]
    for owner, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            path = f"{owner}.{name}" if owner else name
            buffer_dtype = dtypes[path]
            if values[path].is_floating_point() and any(one.search(path) for one in kept):
                buffer_dtype = torch.float32
            module._buffers[name] = values[path].to(buffer.device, buffer_dtype)

"""Read the optimizer state of a checkpoint from the files of any number of ranks.

The headers say which file holds which elements of which parameter.

Resuming fills live optimizers from it, and exports take the master weights.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmtune.checkpoint.slices import TensorSlice
from llmtune.errors import CheckpointError
from llmtune.optimizer.block_codes import count_blocks, decode_slice
from llmtune.optimizer.storage import BLOCK_ELEMENTS, FP32, SCALES, STORAGES
from llmtune.storage import layout
from llmtune.storage.plain_json import parse_json


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSlice:
    """Elements ``[start, start + numel)`` of a flattened parameter, in one file."""

    file: Path
    name: str
    """Name of the parameter."""
    start: int
    numel: int
    storages: Mapping[str, str]
    """The format of each kind of its numbers, as :data:`STORAGES` names them."""

    @property
    def end(self) -> int:
        """Return the first element that is no longer in it."""
        return self.start + self.numel

    def read(self, kind: str, first: int, last: int) -> torch.Tensor:
        """Read elements ``[first, last)`` of the parameter. Shape (last - first,).

        Those that are stored in blocks are decoded.

        Raises:
            CheckpointError: The file does not hold them.
        """
        storage = STORAGES[self.storages.get(kind, FP32.name)]
        try:
            with safe_open(str(self.file), framework="pt") as handle:
                stored = handle.get_slice(f"{self.name}/{kind}")
                values: torch.Tensor = stored[first - self.start : last - self.start]
                if storage.in_blocks:
                    block = first // BLOCK_ELEMENTS - self.start // BLOCK_ELEMENTS
                    count = count_blocks(first, last - first)
                    scales = handle.get_slice(f"{self.name}/{kind}{SCALES}")
                    values = decode_slice(values, scales[block : block + count], first, storage)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.file}: {self.name}/{kind}: {error}") from error
        if values.shape != (last - first,):
            raise CheckpointError(
                f"{self.file}: {self.name}/{kind} has another size than its header says"
            )
        return values

    def read_uncut(self, kind: str, numel: int) -> torch.Tensor:
        """Read a state of ``numel`` elements that is not cut with the parameter. Shape (numel,).

        Raises:
            CheckpointError: The file does not hold it.
        """
        try:
            with safe_open(str(self.file), framework="pt") as handle:
                values: torch.Tensor = handle.get_tensor(f"{self.name}/{kind}")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.file}: {self.name}/{kind}: {error}") from error
        if values.shape != (numel,):
            raise CheckpointError(
                f"{self.file}: {self.name}/{kind} has the shape {tuple(values.shape)}, and not"
                f" ({numel},)"
            )
        return values


@dataclass(frozen=True, slots=True)
class StoredParameter:
    """All slices of one parameter that the files hold."""

    numel: int
    """Elements of the whole parameter."""
    slices: tuple[StoredSlice, ...]
    """The slices, sorted by their start."""

    def read(self, kind: str, start: int, numel: int) -> torch.Tensor:
        """Put elements ``[start, start + numel)`` together from the slices that overlap them.

        Args:
            kind: Master weight or a moment, as the live optimizer calls it.

        Returns:
            Shape (numel,), fp32.

        Raises:
            CheckpointError: The slices do not cover them.
        """
        values = torch.empty(numel)
        filled = 0
        for piece in self.slices:
            first, last = max(start, piece.start), min(start + numel, piece.end)
            if first < last:
                values[first - start : last - start] = piece.read(kind, first, last)
                filled += last - first
        if filled != numel:
            piece = self.slices[0]
            raise CheckpointError(
                f"{piece.file.parent}: {piece.name}/{kind} is covered for {filled} of {numel}"
                " elements; a state file is missing"
            )
        return values

    def read_uncut(self, kind: str, numel: int) -> torch.Tensor:
        """Read a state that is not cut: the parameter's first slice has all of it.

        Args:
            numel: Its elements.

        Returns:
            Shape (numel,), fp32.

        Raises:
            CheckpointError: The file is missing, or does not hold as many.
        """
        first = self.slices[0]
        if first.start != 0:
            raise CheckpointError(
                f"{first.file.parent}: {first.name}/{kind} is not there; a state file is missing"
            )
        return first.read_uncut(kind, numel)


def read_stored_states(files: Iterable[Path]) -> dict[str, StoredParameter]:
    """Read the headers of state files; return what they hold, by the parameter's name.

    Raises:
        CheckpointError: A file is damaged or no state file, or its header does not say what is in
            it.
    """
    slices: dict[str, list[StoredSlice]] = defaultdict(list)
    numels: dict[str, int] = {}
    for file in files:
        for piece, numel in _read_header(file):
            slices[piece.name].append(piece)
            if numels.setdefault(piece.name, numel) != numel:
                raise CheckpointError(
                    f"{file}: {piece.name} has {numel} elements there and {numels[piece.name]} in"
                    " another state file"
                )
    return {
        name: StoredParameter(
            numels[name], tuple(sorted(pieces, key=lambda piece: (piece.start, piece.end)))
        )
        for name, pieces in slices.items()
    }


def map_slices(stored: dict[str, StoredParameter], kind: str) -> dict[str, list[TensorSlice]]:
    """Map one kind of numbers of every parameter, in order: views of the files' own bytes."""
    files = {piece.file for parameter in stored.values() for piece in parameter.slices}
    # Each file is mapped once: the kernel limits the number of mappings.
    handles = {file: safe_open(str(file), framework="pt") for file in files}
    mapped: dict[str, list[TensorSlice]] = {name: [] for name in stored}
    for name, parameter in stored.items():
        for piece in parameter.slices:
            handle: Any = handles[piece.file]
            values = handle.get_tensor(f"{name}/{kind}")
            mapped[name].append(TensorSlice(piece.start, values.reshape(-1)))
    return mapped


def _read_header(file: Path) -> list[tuple[StoredSlice, int]]:
    """Read which slices a file holds, each with the number of elements of its parameter."""
    pieces = []
    try:
        with safe_open(str(file), framework="pt") as handle:
            header = handle.metadata()
            where: dict[str, Any] = parse_json(header[layout.STATE_SLICES])
            storages = _read_storages(header, handle.keys())
            for name, (start, numel, total) in where.items():
                if min(start, numel) < 0 or start + numel > total:
                    raise ValueError(f"{name}: {numel} elements from {start} of {total}")

                # The header must agree with the tensor that it describes.
                shape = handle.get_slice(f"{name}/{layout.MASTER_WEIGHT}").get_shape()
                if math.prod(shape) != numel:
                    raise CheckpointError(f"{file}: {name} has another size than its header says")
                piece = StoredSlice(
                    file=file, name=name, start=int(start), numel=int(numel), storages=storages
                )
                pieces.append((piece, int(total)))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise CheckpointError(f"{file} is cut off or damaged ({error})") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # A header may hold anything.
        raise CheckpointError(f"{file} is not a state file of llmtune ({error!r})") from error
    return pieces


def _read_storages(header: Mapping[str, str], tensors: Iterable[str]) -> dict[str, str]:
    """Read how numbers are stored; all in fp32 where a file does not say so."""
    if layout.STATE_STORAGES not in header:
        return {name.rpartition("/")[2]: FP32.name for name in sorted(tensors)}
    storages: dict[str, str] = parse_json(header[layout.STATE_STORAGES])
    if unknown := set(storages.values()) - set(STORAGES):
        raise ValueError(f"numbers stored as {min(unknown)}")
    return storages

"""Check what hashes cannot show: that tensors are finite, and that an adapter was trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmtune.storage.tensors.dtypes import TYPES

#: Bytes compared at once, unless one row is larger.
BLOCK_BYTES = 64 << 20

#: Bytes of a number as it is compared: torch compares 8-bit floats as fp32 only. F8_E8M0 holds
#: scales, and no weights.
_FLOATING = {name: max(kind.nbytes, 2) for name, kind in TYPES.items() if kind.is_floating}
_FLOATING |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0"), 4)

#: The matrix of a LoRA pair that peft initializes with zeros; for an embedding it is A.
_ZERO_AT_START = ("lora_B", "lora_embedding_A")


def find_bad_tensors(file: Path) -> list[str]:
    """Find tensors that are not finite, or why the file cannot be read. Takes memory for one block.

    Returns:
        A sentence per tensor; none for a good file.
    """
    problems = []
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                kind = next(filter(None, map(_not_finite, _blocks(tensors, name))), None)
                if kind:
                    problems.append(f"{file.name}: tensor {name} holds {kind}")
    except (OSError, SafetensorError) as error:
        problems.append(f"{file.name} cannot be read ({error})")
    return problems


def find_untrained_adapter(file: Path) -> list[str]:
    """Find out whether every ``lora_B`` is still zero, as peft initializes it: it was not trained.

    Returns:
        A sentence where it is so, or where the file cannot be read; none for a good file.
    """
    has_pairs = False
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if any(part in name for part in _ZERO_AT_START):
                    has_pairs = True
                    if any(bool(block.any()) for block in _blocks(tensors, name)):
                        return []
    except (OSError, SafetensorError) as error:
        return [f"{file.name} cannot be read ({error})"]
    return (
        [f"{file.name}: every lora_B is zero, so the adapter changes nothing: it was not trained"]
        if has_pairs
        else []
    )


def _blocks(tensors: Any, name: str) -> Iterator[torch.Tensor]:
    """Yield a floating tensor as blocks of rows, in a dtype that torch can compare."""
    piece = tensors.get_slice(name)
    shape, itemsize = piece.get_shape(), _FLOATING.get(piece.get_dtype())
    if itemsize is None or 0 in shape:
        return
    if not shape:
        yield _comparable(tensors.get_tensor(name))
        return
    rows = max(1, BLOCK_BYTES // (itemsize * math.prod(shape[1:])))
    for first in range(0, shape[0], rows):
        yield _comparable(piece[first : first + rows])


def _comparable(block: torch.Tensor) -> torch.Tensor:
    # torch does not compare 8-bit floats.
    return block.float() if block.dtype.itemsize == 1 else block


def _not_finite(block: torch.Tensor) -> str | None:
    """Name what is not finite in a block: ``NaN`` or ``infinity``."""
    # Extremes carry both, in a fraction of the time of isfinite and without a copy.
    low, high = (float(value) for value in torch.aminmax(block))
    if math.isnan(low) or math.isnan(high):
        return "NaN"
    return "infinity" if math.isinf(low) or math.isinf(high) else None

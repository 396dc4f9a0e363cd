"""What hashes cannot tell: whether the tensors of a file are numbers, and whether an adapter was
trained at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

#: Bytes looked at in one piece, unless one row is larger.
BLOCK_BYTES = 64 << 20

# : Dtypes, as safetensors spells them, that can hold NaN or infinity -> bytes of an element as it
# is compared.
_FLOATING = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 4, "F8_E5M2": 4, "F8_E8M0": 4}

#: The half of a LoRA pair that starts at zero; of an embedding it is A.
_ZERO_AT_START = ("lora_B", "lora_embedding_A")


def find_tensor_problems(file: Path) -> list[str]:
    """Tensors that are not finite, by name; or why the file cannot be read. Memory: one block."""
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
    """A LoRA adapter whose every ``lora_B`` is zero changes nothing: peft starts them there, so it
    was never trained.
    """
    found = False
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if any(part in name for part in _ZERO_AT_START):
                    found = True
                    if any(bool(block.any()) for block in _blocks(tensors, name)):
                        return []
    except (OSError, SafetensorError) as error:
        return [f"{file.name} cannot be read ({error})"]
    return (
        [f"{file.name}: every lora_B is zero, so the adapter changes nothing: it was not trained"]
        if found
        else []
    )


def _blocks(tensors: Any, name: str) -> Iterator[torch.Tensor]:
    """A floating tensor by blocks of rows, in a dtype that torch can compare."""
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
    """torch compares no 8-bit floats."""
    return block.float() if block.dtype.itemsize == 1 else block


def _not_finite(block: torch.Tensor) -> str | None:
    """``NaN`` or ``infinity``.

    Extremes carry both, in a fraction of the time of ``isfinite`` and without a copy.
    """
    low, high = (float(value) for value in torch.aminmax(block))
    if math.isnan(low) or math.isnan(high):
        return "NaN"
    return "infinity" if math.isinf(low) or math.isinf(high) else None

"""Types of numbers: their names in safetensors, torch and the configuration, and their bytes.

torch is imported where a dtype is asked for: planning and reading data do without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class NumberType:
    """One type of numbers."""

    torch_name: str
    nbytes: int
    """Bytes of one number."""

    @property
    def is_floating(self) -> bool:
        """Tell whether it can hold NaN or infinity."""
        return "float" in self.torch_name


#: safetensors' names (https://github.com/huggingface/safetensors#format) -> the type.
TYPES = {
    "F64": NumberType("float64", 8),
    "F32": NumberType("float32", 4),
    "F16": NumberType("float16", 2),
    "BF16": NumberType("bfloat16", 2),
    "F8_E4M3": NumberType("float8_e4m3fn", 1),
    "F8_E5M2": NumberType("float8_e5m2", 1),
    "I64": NumberType("int64", 8),
    "I32": NumberType("int32", 4),
    "I16": NumberType("int16", 2),
    "I8": NumberType("int8", 1),
    "U8": NumberType("uint8", 1),
    "BOOL": NumberType("bool", 1),
}

#: Types of the tensors that llmtune computes with and writes.
WRITABLE = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL")

#: The configuration's names -> torch's.
_CONFIGURED = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_BY_TORCH_NAME = {kind.torch_name: name for name, kind in TYPES.items()}


def to_torch(name: str) -> torch.dtype:
    """Look up the dtype of one of safetensors' names in :data:`TYPES`."""
    return _dtype(TYPES[name].torch_name)


def to_safetensors(dtype: torch.dtype) -> str | None:
    """Look up what safetensors calls a dtype; None where llmtune does not write it."""
    name = _BY_TORCH_NAME.get(str(dtype).removeprefix("torch."))
    return name if name in WRITABLE else None


def configured_dtype(name: str) -> torch.dtype:
    """Look up the dtype of a value of ``precision`` or ``export.dtype``: bf16, fp16 or fp32."""
    return _dtype(_CONFIGURED[name])


def _dtype(torch_name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, torch_name)
    return dtype

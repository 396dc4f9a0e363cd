"""Starts that move a part of the base's weights into the adapter: PiSSA and OLoRA.

The adapter begins as ``s * B0 @ A0``, the part of a weight ``W`` along a few directions, and the
base keeps ``W - s * B0 @ A0``. PiSSA (https://arxiv.org/abs/2404.02948) takes the largest singular
values, OLoRA (https://arxiv.org/abs/2406.01775) the first columns of a QR decomposition. The values
are peft's (``pissa_init`` and ``olora_init`` of ``peft/tuners/lora/layer.py``).

What is stored fits the unchanged base: ``W - s * B0 @ A0 + s * B @ A`` is ``W`` with a plain
adapter of twice the rank, ``[B, -B0] @ [A; A0]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch

from llmtune.tuner.lora_settings import TAKEN_ROWS, iterations
from llmtune.tuner.stored_adapter import MATRICES, to_file_name

#: Attribute of the adapted model that has its start. Its values are on the rank that writes the
#: adapter, and others have the shapes alone.
_ATTRIBUTE = "llmtune_start"


@dataclass(frozen=True, slots=True)
class Factors:
    """The first values of a layer's adapter."""

    a: torch.Tensor
    """Shape (r, in), in the training dtype."""
    b: torch.Tensor
    """Shape (out, r), in the training dtype."""

    def to(self, device: Any) -> Factors:
        """Copy them to a device."""
        return Factors(self.a.to(device), self.b.to(device))


def decompose(
    weight: torch.Tensor, rank: int, scale: float, start: str, dtype: torch.dtype | None = None
) -> Factors:
    """Compute the first values of an adapter in fp32.

    Args:
        weight: Shape (out, in), whole.
        scale: The factor of ``B @ A``.
        start: ``tuner.init_lora_weights``.
        dtype: Of the values; the weight's where none is given.
    """
    dtype = dtype or weight.dtype
    values = weight.detach().float()
    if start == "olora":
        q, r = torch.linalg.qr(values)
        a, b = r[:rank], q[:, :rank]
    else:
        niter = iterations(start)
        if niter is None:
            left, singular, right = torch.linalg.svd(values, full_matrices=False)
            left, singular, right = left[:, :rank], singular[:rank], right[:rank]
        else:
            left, singular, columns = torch.svd_lowrank(values, rank, niter=niter)
            right = columns.T
        root = torch.diag(torch.sqrt(singular / scale))
        a, b = root @ right, left @ root
    return Factors(*(_copy(factor, dtype) for factor in (a, b)))


def _copy(part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Copy a part of a tensor, whose memory a view would keep."""
    return torch.empty(part.shape, dtype=dtype, device=part.device).copy_(part)


def taken_pieces(
    factors: Factors, scale: float, start: int, count: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield elements ``[start, start + count)`` of the flattened ``s * B0 @ A0``, in fp32.

    Returns:
        The first element of each piece, counted from ``start``, and its values.
    """
    width = factors.a.shape[1]
    first_row, end_row = start // width, -(-(start + count) // width)
    a, b = factors.a.float(), scale * factors.b.float()
    for block in range(first_row // TAKEN_ROWS * TAKEN_ROWS, end_row, TAKEN_ROWS):
        values = (b[block : block + TAKEN_ROWS] @ a).reshape(-1)
        begin = max(start, block * width)
        end = min(start + count, block * width + values.numel())
        yield begin - start, values[begin - block * width : end - block * width]


def set_start(model: Any, start: Mapping[str, Factors]) -> None:
    """Keep the first values of an adapted model, by the names of the layers' parameters."""
    setattr(model, _ATTRIBUTE, dict(start))


def get_start(model: Any) -> dict[str, Factors]:
    """Return what :func:`set_start` kept; empty for an adapter with another start."""
    return dict(getattr(model, _ATTRIBUTE, {}))


def adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield peft's layers with a pair of matrices, by name, in the order of the model."""
    from peft.tuners.lora.layer import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and module.lora_A:
            yield name, module


def stored_parts(model: Any) -> dict[str, tuple[torch.Tensor, int]]:
    """Return what is stored behind each matrix: ``A0`` below ``A``, and ``-B0`` beside ``B``.

    Returns:
        Name of the matrix's parameter -> tensor, and the dimension along which it is joined.
    """
    parts: dict[str, tuple[torch.Tensor, int]] = {}
    for name, factors in get_start(model).items():
        for dim, (ending, tensor) in enumerate(zip(MATRICES, (factors.a, -factors.b), strict=True)):
            parts[_parameter(name, ending)] = (tensor, dim)
    return parts


def double_rank(settings: Any) -> Any:
    """Return peft's settings of the adapter as it is stored: of twice the rank, and equal scale."""
    doubled = copy(settings)
    factor = math.sqrt(2) if settings.use_rslora else 2
    doubled.r = 2 * settings.r
    doubled.lora_alpha = factor * settings.lora_alpha
    doubled.rank_pattern = {key: 2 * rank for key, rank in settings.rank_pattern.items()}
    doubled.alpha_pattern = {key: factor * scale for key, scale in settings.alpha_pattern.items()}
    return doubled


def split_stored(
    stored: Mapping[str, torch.Tensor], layers: Mapping[str, int]
) -> tuple[dict[str, torch.Tensor], dict[str, Factors]]:
    """Take an adapter of twice the rank apart: the matrices as trained, and their start.

    Args:
        stored: Tensors by their names in the file.
        layers: Name of each layer of the model -> its rank.
    """
    trained, start = dict(stored), {}
    for name, rank in layers.items():
        key_a, key_b = (to_file_name(_parameter(name, ending)) for ending in MATRICES)
        a, b = stored[key_a], stored[key_b]
        trained[key_a], trained[key_b] = a[:rank], b[:, :rank]
        start[name] = Factors(_copy(a[rank:], a.dtype), _copy(-b[:, rank:], b.dtype))
    return trained, start


def _parameter(layer: str, ending: str) -> str:
    return f"{layer}{ending.removesuffix('.weight')}.default.weight"

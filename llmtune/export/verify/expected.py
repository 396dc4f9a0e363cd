"""What a merged model's tensors must be, told by peft's own layers on the skeleton of the base.

Nothing here asks the merge: which module a matrix belongs to, its scale, rank, orientation and
DoRA's lengths are read from the layers that peft itself built from ``adapter_config.json`` and
filled from the adapter's file. Rows are computed block by block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from llmtune.export.sources.base import TensorSource, find_name
from llmtune.export.verify.streamed_model import StreamedModel, Unit
from llmtune.model.skeleton import is_hollow

#: Relative error of one rounding to fp32, in which merges are computed.
_FP32 = 2.0**-24

_PEFT_PREFIX = "base_model.model."


@dataclass(slots=True, kw_only=True)
class Expected:
    """One parameter of the merged model: ``start``, or the base's numbers, and what peft's layers
    do to them.
    """

    name: str
    """In the model that ``config.json`` describes."""
    start: torch.Tensor | None = None
    """The whole tensor where the adapter brings it; None for the base's."""
    delta: Delta | None = None
    added: torch.Tensor | None = None
    """A vector that is added to a bias, fp64."""
    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    """Rows that were trained one by one, by their numbers."""

    @property
    def adapted(self) -> bool:
        """Whether it is other than the base's tensor."""
        return (
            self.start is not None
            or self.delta is not None
            or self.added is not None
            or bool(self.rows)
        )

    def exact(self, base: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the tensor in fp64, and how far fp32 arithmetic may be off; both of the shape of
        ``base``.

        Args:
            base: Rows to start from.
            first: The number of the first of them.
        """
        value = base.double()
        slack = torch.zeros_like(value)
        if self.delta is not None:
            value, slack = self.delta.exact(value, first)
        if self.added is not None:
            more = self.added[first : first + len(base)]
            slack = 3 * _FP32 * (value.abs() + more.abs())
            value = value + more
        self._put_rows(value, first, slack)
        return value, slack

    def quick(self, base: torch.Tensor, first: int) -> torch.Tensor:
        """The same rows in fp32."""
        value = base.float()
        if self.delta is not None:
            value = self.delta.quick(value, first)
        if self.added is not None:
            value = value + self.added[first : first + len(base)].float()
        if any(first <= row < first + len(base) for row in self.rows):
            value = value.clone()
            self._put_rows(value, first)
        return value

    def _put_rows(self, value: torch.Tensor, first: int, slack: torch.Tensor | None = None) -> None:
        for row, numbers in self.rows.items():
            if first <= row < first + len(value):
                value[row - first] = numbers.to(value.dtype)
                if slack is not None:
                    slack[row - first] = 0


@dataclass(slots=True, kw_only=True)
class Delta:
    """``W + scale * B @ A``; with lengths, DoRA's ``m * (W + scale * B @ A) / ||W + scale * B @
    A||`` over an output's inputs.
    """

    a: torch.Tensor
    """Shape (r, inputs)."""
    b: torch.Tensor
    """Shape (outputs, r)."""
    scale: float
    by_input: bool
    """Whether the stored rows are inputs, as of embeddings and of GPT-2's Conv1D."""
    lengths: torch.Tensor | None = None
    """Shape (outputs,)."""
    norms: torch.Tensor | None = None
    """Of every output, where they run over all stored rows; and what fp32 may miss them by,
    relative. Shape (2, outputs).
    """

    def measure(self, rows: Iterator[torch.Tensor]) -> None:
        """Find the norms that run over all stored rows, in one pass over them."""
        if self.lengths is None or not self.by_input:
            return
        squares, missed, first = torch.zeros(2, len(self.b), dtype=torch.float64), 0.0, 0
        for block in rows:
            value, slack = self._plain(block.double(), first)
            squares += torch.stack([value.square().sum(0), slack.square().sum(0)])
            first += len(block)
        norm, off = squares.sqrt()
        missed = _norm_error(self.a.shape[1])
        self.norms = torch.stack([norm, off / norm + missed])

    def exact(self, rows: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`Expected.exact`."""
        value, slack = self._plain(rows, first)
        if self.lengths is None:
            return value, slack
        if self.norms is not None:
            norm, off = self.norms
            factor = self.lengths.double() / norm
        else:
            norm = value.norm(dim=1, keepdim=True)
            off = slack.norm(dim=1, keepdim=True) / norm + _norm_error(value.shape[1])
            factor = self.lengths[first : first + len(rows)].double().view(-1, 1) / norm
        value = value * factor
        return value, slack * factor.abs() + value.abs() * (off + 4 * _FP32)

    def quick(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        """As :meth:`Expected.quick`."""
        value = self._product(rows, first, torch.float32).mul_(self.scale).add_(rows)
        if self.lengths is None:
            return value
        if self.norms is not None:
            return value * (self.lengths / self.norms[0].float())
        norms: torch.Tensor = torch.linalg.vector_norm(value, dim=1)
        return value * (self.lengths[first : first + len(rows)] / norms).view(-1, 1)

    def _plain(self, rows: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Without lengths. Of a sum of r products fp32 loses at most r roundings of their absolute
        values, which is bounded by the lengths of the two vectors (Higham 2002, section 3.1; Cauchy
        and Schwarz)."""
        last = first + len(rows)
        left = (
            self.a[:, first:last].norm(dim=0) if self.by_input else self.b[first:last].norm(dim=1)
        ).double()
        right = (self.b.norm(dim=1) if self.by_input else self.a.norm(dim=0)).double()
        slack = (
            torch.outer(left, right)
            .mul_((len(self.a) + 4) * _FP32 * abs(self.scale))
            .add_(rows.abs(), alpha=2 * _FP32)
        )
        return self._product(rows, first, torch.float64).mul_(self.scale).add_(rows), slack

    def _product(self, rows: torch.Tensor, first: int, dtype: torch.dtype) -> torch.Tensor:
        last = first + len(rows)
        if self.by_input:
            return self.a[:, first:last].T.to(dtype) @ self.b.T.to(dtype)
        return self.b[first:last].to(dtype) @ self.a.to(dtype)


def _norm_error(count: int) -> float:
    """A sum of squares gathers its roundings as a random walk does; four times what is expected of
    one running sum.
    """
    return _FP32 * (2 * math.sqrt(count) + 4)


@dataclass(slots=True)
class Expectations:
    """What peft's layers say of a whole model."""

    tensors: dict[str, Expected]
    """By name: those that the adapter changes, and those that the base ties to one of these."""
    modules: dict[str, list[str]]
    """Adapted module -> its parameters among them."""
    unknown: list[Unit]
    """Wrappers whose arithmetic is not known here; their answers have to be compared."""


def find_expected(model: StreamedModel) -> Expectations:
    """Read off what the adapter on a skeleton makes of its base."""
    found = Expectations({}, {}, [])
    for unit in model.units:
        tensors = _of_unit(unit)
        if tensors is None:
            found.unknown.append(unit)
            continue
        changed = {name: tensor for name, tensor in tensors.items() if tensor.adapted}
        if changed:
            found.tensors |= changed
            found.modules[unit.name.removeprefix(_PEFT_PREFIX)] = list(changed)
    for name in list(found.tensors):
        for other in model.aliases.get(name, ()):
            found.tensors.setdefault(other, Expected(name=other))
    for unit in found.unknown:
        for name, _ in unit.inner:
            found.tensors = {
                key: value for key, value in found.tensors.items() if not key.startswith(f"{name}.")
            }
    return found


def base_rows(expected: Expected, base: TensorSource, aliases: dict[str, list[str]]) -> str | None:
    """The base's tensor that a parameter starts from; None where the base has none."""
    tries = (expected.name, *aliases.get(expected.name, ()))
    return next(
        (found for name in tries if (found := find_name(name, base.specs)) is not None), None
    )


def _of_unit(unit: Unit) -> dict[str, Expected] | None:
    """Parameters by name; None for a wrapper that is not known."""
    from peft.tuners.lora.layer import Embedding, Linear
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    tensors = {
        f"{name}.{key}": Expected(
            name=f"{name}.{key}", start=None if is_hollow(parameter) else parameter.detach()
        )
        for name, module in unit.inner
        for key, parameter in module._parameters.items()
        if parameter is not None
    }
    outer = unit.outer
    if not unit.wrapped:
        return tensors
    if isinstance(outer, ModulesToSaveWrapper):
        return _of_saved(unit, tensors)
    if len(unit.inner) != 1:
        return None
    ((name, module),) = unit.inner
    if isinstance(outer, TrainableTokensWrapper) and outer.token_adapter.base_layer is module:
        layer = outer.token_adapter
        (adapter,) = layer.token_indices
        rows = zip(
            layer.token_indices[adapter],
            layer.trainable_tokens_delta[adapter].detach(),
            strict=True,
        )
        tensors[f"{name}.weight"].rows = dict(rows)
        return tensors
    if type(outer) in (Linear, Embedding) and outer.base_layer is module:
        return tensors if _add_lora(outer, name, tensors) else None
    return None


def _of_saved(unit: Unit, tensors: dict[str, Expected]) -> dict[str, Expected]:
    """A module that was trained as a whole, with all that is in it."""
    ((_, copy),) = unit.outer.modules_to_save.items()
    stem = unit.name.removeprefix(_PEFT_PREFIX)
    for key, parameter in copy.named_parameters():
        name = f"{stem}.{key}"
        tensors[name] = Expected(name=name, start=parameter.detach())
    return tensors


def _add_lora(layer: Any, name: str, tensors: dict[str, Expected]) -> bool:
    """The matrices of one of peft's LoRA layers; whether nothing else is on it."""
    from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant

    matrices = layer.lora_A or layer.lora_embedding_A
    (adapter,) = matrices
    variant = layer.lora_variant.get(adapter)
    if variant is not None and type(variant) not in (DoraLinearVariant, DoraEmbeddingVariant):
        return False
    if layer.lora_A:
        a, b, by_input = (
            layer.lora_A[adapter].weight,
            layer.lora_B[adapter].weight,
            bool(layer.fan_in_fan_out),
        )
    else:
        a, b, by_input = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter], True
    scale = float(layer.scaling[adapter])
    lengths = (
        layer.lora_magnitude_vector[adapter].weight.detach().reshape(-1)
        if variant is not None
        else None
    )
    tensors[f"{name}.weight"].delta = Delta(
        a=a.detach(), b=b.detach(), scale=scale, by_input=by_input, lengths=lengths
    )
    bias = layer.lora_B[adapter].bias if layer.lora_A else None
    if bias is not None:
        tensors[f"{name}.bias"].added = bias.detach().double() * scale
    return True

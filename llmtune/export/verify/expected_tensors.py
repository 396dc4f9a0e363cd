"""Compute the expected tensors of a merged model from peft's own layers.

The code of the merge is not used: which module a matrix belongs to, its scale, rank, orientation
and DoRA's lengths are read from the layers that peft built from ``adapter_config.json`` on the
skeleton of the base, and filled from the adapter's file. Rows are computed block by block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from llmtune.export.sources.tensor_source import TensorSource, find_name
from llmtune.export.verify.unit import Unit
from llmtune.model.skeleton import is_hollow

#: Relative error of one rounding to fp32, in which merges are computed.
FP32 = 2.0**-24

PEFT_PREFIX = "base_model.model."


class Delta(Protocol):
    """The change that an adapter makes to the rows of a tensor."""

    def measure(self, rows: Iterator[torch.Tensor]) -> None:
        """Compute what depends on all rows, in one pass over them."""

    def exact(self, rows: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute rows as :meth:`ExpectedTensor.exact` does."""

    def quick(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        """Compute rows as :meth:`ExpectedTensor.quick` does."""


@dataclass(slots=True, kw_only=True)
class ExpectedTensor:
    """One parameter of the merged model: its start values, and what peft's layers do to them."""

    name: str
    """Its name in the model that ``config.json`` describes."""
    start: torch.Tensor | None = None
    """The tensor that the adapter brings; None for the base's."""
    delta: Delta | None = None
    added: torch.Tensor | None = None
    """A vector in fp64 that is added to a bias."""
    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    """Index -> row, of rows that were trained one by one."""

    @property
    def adapted(self) -> bool:
        """Return whether it differs from the base's tensor."""
        return (
            self.start is not None
            or self.delta is not None
            or self.added is not None
            or bool(self.rows)
        )

    def exact(self, base: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute rows of the tensor in fp64, and a bound of the error of fp32 arithmetic.

        Args:
            base: Rows to start from; both results have their shape.
            first: The index of the first of them.
        """
        value = base.double()
        slack = torch.zeros_like(value)
        if self.delta is not None:
            value, slack = self.delta.exact(value, first)
        if self.added is not None:
            more = self.added[first : first + len(base)]
            slack = 3 * FP32 * (value.abs() + more.abs())
            value = value + more
        self._replace_rows(value, first, slack)
        return value, slack

    def quick(self, base: torch.Tensor, first: int) -> torch.Tensor:
        """Compute the same rows in fp32."""
        value = base.float()
        if self.delta is not None:
            value = self.delta.quick(value, first)
        if self.added is not None:
            value = value + self.added[first : first + len(base)].float()
        if any(first <= row < first + len(base) for row in self.rows):
            value = value.clone()
            self._replace_rows(value, first)
        return value

    def _replace_rows(
        self, value: torch.Tensor, first: int, slack: torch.Tensor | None = None
    ) -> None:
        for row, trained in self.rows.items():
            if first <= row < first + len(value):
                value[row - first] = trained.to(value.dtype)
                if slack is not None:
                    slack[row - first] = 0


@dataclass(slots=True, kw_only=True)
class ExpectedDelta:
    """``V = W + scale * B @ A``; with lengths, DoRA's ``m * V / ||V||``, normed per output."""

    a: torch.Tensor
    """Shape (r, inputs)."""
    b: torch.Tensor
    """Shape (outputs, r)."""
    scale: float
    by_input: bool
    """True if the stored rows are inputs, as in embeddings and GPT-2's Conv1D."""
    lengths: torch.Tensor | None = None
    """Shape (outputs,)."""
    norms: torch.Tensor | None = None
    """Norms per output, where they run over all stored rows, and their bound; shape (2, outputs).

    The bound is that of their relative error in fp32.
    """

    def measure(self, rows: Iterator[torch.Tensor]) -> None:
        """Compute the norms that run over all stored rows, in one pass over them."""
        if self.lengths is None or not self.by_input:
            return
        squares = torch.zeros(2, len(self.b), dtype=torch.float64)
        first = 0
        for block in rows:
            value, slack = self._plain(block.double(), first)
            squares += torch.stack([value.square().sum(0), slack.square().sum(0)])
            first += len(block)
        norm, off = squares.sqrt()
        self.norms = torch.stack([norm, off / norm + _norm_error(self.a.shape[1])])

    def exact(self, rows: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute rows as :meth:`ExpectedTensor.exact` does."""
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
        return value, slack * factor.abs() + value.abs() * (off + 4 * FP32)

    def quick(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        """Compute rows as :meth:`ExpectedTensor.quick` does."""
        value = self._product(rows, first, torch.float32).mul_(self.scale).add_(rows)
        if self.lengths is None:
            return value
        if self.norms is not None:
            return value * (self.lengths / self.norms[0].float())
        norms: torch.Tensor = torch.linalg.vector_norm(value, dim=1)
        return value * (self.lengths[first : first + len(rows)] / norms).view(-1, 1)

    def _plain(self, rows: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute rows without lengths, and the bound of their error in fp32.

        A sum of r products in fp32 is off by at most r roundings of their absolute values, which
        the norms of the two vectors bound (Higham 2002, section 3.1; Cauchy and Schwarz).
        """
        last = first + len(rows)
        if self.by_input:
            row_norms, column_norms = self.a[:, first:last].norm(dim=0), self.b.norm(dim=1)
        else:
            row_norms, column_norms = self.b[first:last].norm(dim=1), self.a.norm(dim=0)
        slack = (
            torch.outer(row_norms.double(), column_norms.double())
            .mul_((len(self.a) + 4) * FP32 * abs(self.scale))
            .add_(rows.abs(), alpha=2 * FP32)
        )
        return self._product(rows, first, torch.float64).mul_(self.scale).add_(rows), slack

    def _product(self, rows: torch.Tensor, first: int, dtype: torch.dtype) -> torch.Tensor:
        last = first + len(rows)
        if self.by_input:
            return self.a[:, first:last].T.to(dtype) @ self.b.T.to(dtype)
        return self.b[first:last].to(dtype) @ self.a.to(dtype)


def _norm_error(count: int) -> float:
    """Bound the relative error of the norm of ``count`` numbers in fp32.

    The roundings of a sum of squares add up as a random walk; this is four times the expected error
    of one running sum.
    """
    return FP32 * (2 * math.sqrt(count) + 4)


@dataclass(slots=True)
class Expectations:
    """The expected tensors of a whole model."""

    tensors: dict[str, ExpectedTensor]
    """Tensors that the adapter changes, and those that the base ties to one of them, by name."""
    modules: dict[str, list[str]]
    """Adapted module -> its parameters among them."""
    unknown: list[Unit]
    """Wrappers whose arithmetic is not known here; their outputs have to be compared."""


def find_expected(units: Iterable[Unit], aliases: Mapping[str, Sequence[str]]) -> Expectations:
    """Find what the adapter on a skeleton makes of its base.

    Args:
        units: All modules of the skeleton.
        aliases: Parameter -> other names of the same parameter.
    """
    expectations = Expectations({}, {}, [])
    for unit in units:
        tensors = _expect_unit(unit)
        if tensors is None:
            expectations.unknown.append(unit)
            continue
        changed = {name: tensor for name, tensor in tensors.items() if tensor.adapted}
        if changed:
            expectations.tensors |= changed
            expectations.modules[unit.name.removeprefix(PEFT_PREFIX)] = list(changed)

    # What is tied to an adapted parameter keeps the base's numbers, unless it is adapted too.
    for name in list(expectations.tensors):
        for other in aliases.get(name, ()):
            expectations.tensors.setdefault(other, ExpectedTensor(name=other))

    # Nothing is expected of the modules inside unknown wrappers.
    for unit in expectations.unknown:
        for name, _ in unit.inner:
            for key in [key for key in expectations.tensors if key.startswith(f"{name}.")]:
                del expectations.tensors[key]
    return expectations


def find_start(
    expected: ExpectedTensor, base: TensorSource, aliases: dict[str, list[str]]
) -> str | None:
    """Find the base's tensor that a parameter starts from; None where the base has none."""
    for parameter in (expected.name, *aliases.get(expected.name, ())):
        name = find_name(parameter, base.specs)
        if name is not None:
            return name
    return None


def _expect_unit(unit: Unit) -> dict[str, ExpectedTensor] | None:
    """Return the parameters of a unit by name; None for an unknown wrapper."""
    from peft.tuners.lora.layer import Embedding, Linear
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    # Every parameter starts from the base's, or from what the adapter brings whole.
    tensors: dict[str, ExpectedTensor] = {}
    for module_name, module in unit.inner:
        for key, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{module_name}.{key}"
                start = None if is_hollow(parameter) else parameter.detach()
                tensors[name] = ExpectedTensor(name=name, start=start)
    outer = unit.outer
    if not unit.wrapped:
        return tensors
    if isinstance(outer, ModulesToSaveWrapper):
        return _expect_saved_module(unit, tensors)
    if len(unit.inner) != 1:
        return None
    ((name, module),) = unit.inner

    # Rows that were trained one by one.
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

    # LoRA of exactly these classes: a subclass may compute something else.
    if type(outer) in (Linear, Embedding) and outer.base_layer is module:
        return tensors if _add_lora(outer, name, tensors) else None
    return None


def _expect_saved_module(
    unit: Unit, tensors: dict[str, ExpectedTensor]
) -> dict[str, ExpectedTensor]:
    """Add the parameters of a module that was trained as a whole."""
    ((_, copy),) = unit.outer.modules_to_save.items()
    stem = unit.name.removeprefix(PEFT_PREFIX)
    for key, parameter in copy.named_parameters():
        name = f"{stem}.{key}"
        tensors[name] = ExpectedTensor(name=name, start=parameter.detach())
    return tensors


def _add_lora(layer: Any, name: str, tensors: dict[str, ExpectedTensor]) -> bool:
    """Add the matrices of one of peft's LoRA layers.

    Returns:
        Whether the arithmetic of the layer is known; with another variant it is not.
    """
    from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant

    matrices = layer.lora_A or layer.lora_embedding_A
    (adapter,) = matrices
    variant = layer.lora_variant.get(adapter)
    if variant is not None and type(variant) not in (DoraLinearVariant, DoraEmbeddingVariant):
        return False
    if layer.lora_A:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        by_input = bool(layer.fan_in_fan_out)
    else:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        by_input = True
    scale = float(layer.scaling[adapter])
    lengths = None
    if variant is not None:
        lengths = layer.lora_magnitude_vector[adapter].weight.detach().reshape(-1)
    tensors[f"{name}.weight"].delta = ExpectedDelta(
        a=a.detach(), b=b.detach(), scale=scale, by_input=by_input, lengths=lengths
    )
    bias = layer.lora_B[adapter].bias if layer.lora_A else None
    if bias is not None:
        tensors[f"{name}.bias"].added = bias.detach().double() * scale
    return True

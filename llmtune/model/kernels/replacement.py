"""A faster function in the place of a module's forward, and how far the two are apart.

The names of parameters stay as they are, because only ``forward`` of an instance is replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn

#: A forward pass.
Compute = Callable[..., Any]


@dataclass(slots=True, eq=False)
class Comparison:
    """The outcome of one batch that a replacement and the plain function computed."""

    difference: float | None = None
    """Largest :func:`row_difference` so far; None before the first call."""
    error: str | None = None
    """The first line of what the fast function raised."""

    def exceeds(self, limit: float) -> bool:
        """Tell whether the replacement differs by more; NaN and an error do."""
        return self.difference is not None and not self.difference <= limit


@dataclass(slots=True, kw_only=True, eq=False)
class Replacement:
    """A function for which there is a faster one."""

    name: str
    """The path of the module in the model, or the name of a function."""
    kind: str
    """The name of its kind in messages."""
    plain: Compute
    fast: Compute
    put: Callable[[Compute], None]
    """Puts one of the two in its place."""
    is_proved: bool = False
    """Values and gradients were compared on random numbers already."""
    seen: Comparison = field(default_factory=Comparison)

    def use(self) -> None:
        """Compute with the fast function from now on."""
        self.put(self.fast)

    def drop(self) -> None:
        """Compute with the plain function again."""
        self.put(self.plain)

    def compare(self) -> None:
        """Compute with both from now on, note how far they are apart, and go on with the plain."""

        def compute_both(*inputs: Any, **named: Any) -> Any:
            expected = self.plain(*inputs, **named)
            try:
                # Some kernels write over their inputs.
                found = self.fast(*map(_copy, inputs), **{k: _copy(v) for k, v in named.items()})
                difference = max(map(row_difference, _tensors(found), _tensors(expected)))
            except Exception as error:
                # A kernel of another package may raise anything, and there is the plain one.
                difference = math.inf
                self.seen.error = f"{type(error).__name__}: {error}".splitlines()[0]
            worst = self.seen.difference or 0.0
            # NaN stays, whichever comes first.
            is_worse = difference > worst or math.isnan(difference)
            self.seen.difference = difference if is_worse else worst
            return expected

        self.put(compute_both)


def replace_forward(
    module: nn.Module, name: str, kind: str, fast: Compute, is_proved: bool = False
) -> Replacement:
    """Describe a faster forward of a module; nothing is replaced yet.

    Args:
        fast: Takes the module and the arguments of its forward.
    """

    def put(compute: Compute) -> None:
        if compute is plain:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = compute

    plain = MethodType(type(module).forward, module)
    return Replacement(
        name=name,
        kind=kind,
        plain=plain,
        fast=MethodType(fast, module),
        put=put,
        is_proved=is_proved,
    )


def rounding_limit(dtype: torch.dtype) -> float:
    """Return the largest :func:`row_difference` that is rounding.

    A plain forward rounds each number up to three times to the dtype, and its replacement once:
    that is 4 times half the distance of two numbers (``eps``) of the dtype. The rest is for sums in
    fp32 that are added up in another order.
    """
    return 2 * torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps


def row_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest relative difference of two rows.

    It is the 2-norm of the difference over that of the expected row, NaN if there is a NaN, and
    infinite where the shapes or the dtypes differ.

    Args:
        found: Shape (..., row).
        expected: The same shape.
    """
    if found.shape != expected.shape or found.dtype is not expected.dtype:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    # fp64, because squares of small numbers in fp32 are zero.
    one, other = found.detach().double(), expected.detach().double()
    apart = torch.where(one == other, 0.0, one - other).norm(dim=-1)
    # A row of zeros must be one of zeros.
    relative = torch.where(apart == 0, 0.0, apart / other.norm(dim=-1))
    return float(relative.max())


def is_same(
    plain: Compute, fast: Compute, inputs: Iterable[torch.Tensor], of: Iterable[torch.Tensor] = ()
) -> bool:
    """Tell whether two functions agree in values and in gradients, within rounding.

    Args:
        inputs: They need gradients.
        of: Parameters of both whose gradients are compared, too.
    """
    leaves = [*inputs]
    results, gradients = [], []
    for compute in (plain, fast):
        outcome = [*_tensors(compute(*(leaf.view_as(leaf) for leaf in leaves)))]
        results.append(outcome)
        # Any gradient of the result will do that has no pattern.
        weights = [torch.cos(2.0 + 3.7 * _count_up(one)).to(one.dtype) for one in outcome]
        wanted = [*leaves, *of]
        gradients.append(torch.autograd.grad(outcome, wanted, weights))
    limit = rounding_limit(results[0][0].dtype)
    # Backwards there are twice as many roundings.
    return all(
        len(ours) == len(theirs)
        and all(map(lambda one, other: row_difference(one, other) <= bound, ours, theirs))
        for (theirs, ours), bound in ((results, limit), (gradients, 2 * limit))
    )


def _count_up(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(like.numel(), device=like.device, dtype=torch.float64).view(like.shape)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _tensors(result: Any) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)

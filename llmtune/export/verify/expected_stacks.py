"""Compute the expected tensors of stacked experts from peft's own layers around them.

The code of the merge is not used: the factors are peft's (``ParamWrapper.get_delta_factors``), and
where a row of a stack is stored is found by letting transformers take apart a stack of numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from llmtune.export.sources.tensor_source import find_name
from llmtune.export.verify.expected_tensors import (
    FP32,
    PEFT_PREFIX,
    Expectations,
    ExpectedDelta,
    ExpectedTensor,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedStack:
    """``W + scale * left @ right`` for each expert, which is a row of the stored tensor."""

    left: torch.Tensor
    """Shape (experts, rows, r)."""
    right: torch.Tensor
    """Shape (experts, r, columns)."""
    scale: float

    def measure(self, rows: Iterator[torch.Tensor]) -> None:
        """Need nothing of all rows."""

    def exact(self, rows: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute experts as :meth:`ExpectedTensor.exact` does."""
        left, right = self._factors(len(rows), first)
        # As in ExpectedDelta: r roundings of what the norms of two vectors bound.
        bound = left.norm(dim=2, keepdim=True).double() * right.norm(dim=1, keepdim=True).double()
        slack = bound.mul_((left.shape[2] + 4) * FP32 * abs(self.scale))
        value = torch.bmm(left.double(), right.double()).mul_(self.scale).add_(rows)
        return value, slack.add_(rows.abs(), alpha=2 * FP32)

    def quick(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        """Compute experts as :meth:`ExpectedTensor.quick` does."""
        left, right = self._factors(len(rows), first)
        return torch.bmm(left, right).mul_(self.scale).add_(rows)

    def _factors(self, count: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.left[first : first + count], self.right[first : first + count]


def expect_stacks(expectations: Expectations, model: Any, stored: Collection[str]) -> None:
    """Add what peft's layers around stacks do, which are among the unknown wrappers before.

    Args:
        model: peft's model on the skeleton of the base.
        stored: Names of the base's tensors.
    """
    from peft.tuners.lora.layer import ParamWrapper

    for unit in list(expectations.unknown):
        wrapper = unit.outer
        if not isinstance(wrapper, ParamWrapper):
            continue
        tensors: dict[str, ExpectedTensor] = {}
        owner = unit.name.removeprefix(PEFT_PREFIX)
        while isinstance(wrapper, ParamWrapper):
            name = f"{owner}.{wrapper.parameter_name}"
            tensors |= _expect_stack(wrapper, name, model.get_base_model(), stored)
            wrapper = wrapper.base_layer
        expectations.tensors |= tensors
        expectations.modules[owner] = list(tensors)
        expectations.unknown.remove(unit)


def _expect_stack(
    wrapper: Any, name: str, model: Any, stored: Collection[str]
) -> dict[str, ExpectedTensor]:
    """Return the stored tensors that one stack is made of."""
    from transformers.core_model_loading import revert_weight_conversion

    (adapter,) = wrapper.lora_A
    with torch.no_grad():
        left, right, scale = wrapper.get_delta_factors(adapter)
    if find_name(name, stored) is not None:
        stack = ExpectedStack(left=left, right=right, scale=scale)
        return {name: ExpectedTensor(name=name, delta=stack)}
    # The number of each row; a stored tensor then shows which rows it has.
    numbers = torch.arange(left.shape[0] * left.shape[1]).reshape(*left.shape[:2], 1)
    tensors = {}
    for part, rows in revert_weight_conversion(model, {name: numbers}).items():
        expert, first = divmod(int(rows.reshape(-1)[0]), left.shape[1])
        delta = ExpectedDelta(
            a=right[expert],
            b=left[expert, first : first + rows.numel()],
            scale=scale,
            by_input=False,
        )
        tensors[part] = ExpectedTensor(name=part, delta=delta)
    return tensors

"""A torch optimizer around an update rule of ``llmtune/optimizer/``, for DeepSpeed to wrap."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from llmtune.optimizer.param_groups import IS_MATRICES
from llmtune.optimizer.update import Update

if TYPE_CHECKING:
    from llmtune.optimizer.optimizer import Optimizer

#: Elements that are updated at a time. An update may need temporary memory of their size, and ZeRO
#: puts all parameters into one tensor. A CPU has as many in its cache: Lion takes 36 ms for 40 M
#: parameters, and 115 ms in pieces of 2**24.
ELEMENTS_ON_CPU, ELEMENTS_ON_GPU = 2**18, 2**24


class ElementwiseOptimizer(torch.optim.Optimizer):
    """Makes the steps of an optimizer that DeepSpeed does not build itself."""

    def __init__(self, groups: list[dict[str, Any]], rule: Optimizer, settings: dict[str, Any]):
        """
        Args:
            groups: Parameters by group, with the settings that are the group's own.
            rule: The optimizer, which has an ``update``.
            settings: The settings of all other groups, ``lr`` among them.
        """
        super().__init__(groups, dict(settings))
        self._rule = rule

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        assert self._rule.update is not None
        for group in self.param_groups:
            for update in self._updates(group):
                self._rule.update(update)

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Name the states of a group's parameters."""
        matrix = self._rule.matrix
        return matrix.states if matrix is not None and IS_MATRICES in group else self._rule.states

    def _updates(self, group: dict[str, Any]) -> Iterator[Update]:
        """Count the step of each parameter, and yield pieces that fit into the limit together."""
        names = self.state_names(group)
        by_step: dict[int, list[torch.Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_step[self._count(parameter, names)].append(parameter)
        for step, parameters in by_step.items():
            for pieces in _batches([self._pieces(parameter, names) for parameter in parameters]):
                columns = [list(column) for column in zip(*pieces, strict=True)]
                yield Update(
                    parameters=columns[0],
                    gradients=columns[1],
                    states=dict(zip(names, columns[2:], strict=True)),
                    step=step,
                    settings=group,
                )

    def _count(self, parameter: torch.Tensor, names: tuple[str, ...]) -> int:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for name in names:
                state[name] = torch.zeros_like(parameter)
        state["step"] += 1
        return int(state["step"])

    def _pieces(
        self, parameter: torch.Tensor, names: tuple[str, ...]
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """Cut a parameter, its gradient and its states into pieces of at most the limit."""
        state = self.state[parameter]
        assert parameter.grad is not None
        states = [state[name] for name in names]
        limit = _limit(parameter)
        if parameter.numel() <= limit or not parameter.is_contiguous():
            return iter([(parameter, parameter.grad, *states)])
        flat = [parameter.view(-1), parameter.grad.reshape(-1), *(one.view(-1) for one in states)]
        return zip(*(tensor.split(limit) for tensor in flat), strict=True)


def _limit(tensor: torch.Tensor) -> int:
    return ELEMENTS_ON_CPU if tensor.device.type == "cpu" else ELEMENTS_ON_GPU


def _batches(
    of_parameters: list[Iterator[tuple[torch.Tensor, ...]]],
) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """Put pieces together, in order, up to the limit."""
    batch: list[tuple[torch.Tensor, ...]] = []
    numel = 0
    for pieces in of_parameters:
        for piece in pieces:
            if batch and numel + piece[0].numel() > _limit(piece[0]):
                yield batch
                batch, numel = [], 0
            batch.append(piece)
            numel += piece[0].numel()
    if batch:
        yield batch

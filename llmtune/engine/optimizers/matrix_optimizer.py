"""A torch optimizer with a rule for whole matrices, which ZeRO has cut into pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed

from llmtune.engine.distributed import Rank
from llmtune.engine.optimizers.elementwise_optimizer import ElementwiseOptimizer
from llmtune.engine.state_slices import list_slices
from llmtune.optimizer.optimizer import MatrixRule, Optimizer
from llmtune.optimizer.param_groups import IS_MATRICES


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixPart:
    """A matrix, or a stack of them, and the elements of it that this rank has."""

    shape: tuple[int, int, int]
    """Matrices, rows and columns."""
    flat: torch.Tensor
    """The tensor of its group that the optimizer updates."""
    start: int
    """The first own element in the flattened matrix."""
    numel: int
    """Own elements; 0 where other ranks have all."""
    offset: int
    """Place of the first own element in ``flat``."""

    @property
    def is_whole(self) -> bool:
        """Tell whether this rank has all elements."""
        return self.numel == math.prod(self.shape)

    def gradient(self) -> torch.Tensor:
        """Return the own elements of the gradient of ``flat``, as a view."""
        assert self.flat.grad is not None
        return self.flat.grad.view(-1).narrow(0, self.offset, self.numel)


class MatrixOptimizer(ElementwiseOptimizer):
    """Makes the steps of an optimizer that has a :class:`MatrixRule`.

    Ranks take turns: each has every n-th matrix brought to it, finds the direction of its step, and
    sends it to all.
    """

    def __init__(
        self, groups: list[dict[str, Any]], rule: Optimizer, settings: dict[str, Any], rank: Rank
    ):
        """
        Args:
            groups: Parameters by group, with the settings that are the group's own.
            rule: The optimizer, which has an ``update`` and a ``matrix``.
            settings: The settings of all other groups, ``lr`` among them.
        """
        super().__init__(groups, rule, settings)
        assert rule.matrix is not None
        self._matrix: MatrixRule = rule.matrix
        self._rank = rank
        self._parts: dict[int, list[MatrixPart]] = {}
        self._is_everywhere = False

    def place(self, optimizer: Any, model: Any, zero_stage: int) -> None:
        """Find out where the matrices are. Once, before the first step.

        Args:
            optimizer: DeepSpeed's, around this one.
            model: The model in DeepSpeed's engine.
        """
        # Without ZeRO every rank has the same whole gradients.
        self._is_everywhere = zero_stage == 0
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        slices = list_slices(optimizer, model, zero_stage, self._rank.rank)
        own = {part.name: part for part in slices}
        for flat, parameters in _members(optimizer, zero_stage):
            parts = self._parts.setdefault(id(flat), [])
            for parameter in parameters:
                part = own.get(names[id(parameter)])
                shape = getattr(parameter, "ds_shape", parameter.shape)
                if len(shape) < 2:
                    continue
                parts.append(
                    MatrixPart(
                        shape=(math.prod(shape[:-2]), shape[-2], shape[-1]),
                        flat=flat,
                        start=part.start if part is not None else 0,
                        numel=part.numel if part is not None else 0,
                        offset=part.flat_offset if part is not None else 0,
                    )
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. All ranks call it together."""
        assert closure is None
        assert self._rule.update is not None
        for group in self.param_groups:
            if IS_MATRICES not in group:
                for update in self._updates(group):
                    self._rule.update(update)
            elif self._parts:
                # Without parts it is the step that stage 0 makes while it is built, and takes back.
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        flats = [flat for flat in group["params"] if flat.grad is not None]
        for flat in flats:
            # The rule changes pieces of it in place.
            flat.grad = flat.grad.contiguous()
        for update in self._updates(group):
            self._matrix.blend(update)
        parts = list(chain.from_iterable(self._parts[id(flat)] for flat in flats))
        for first in range(0, len(parts), self._rank.world_size):
            self._direct(parts[first : first + self._rank.world_size])
        rate = group["lr"]
        for flat in flats:
            flat.mul_(1 - rate * group["weight_decay"])
            flat.add_(flat.grad, alpha=-rate)

    def _direct(self, turn: Sequence[MatrixPart]) -> None:
        """Replace the gradients of as many matrices as there are ranks by the steps' directions."""
        mine: torch.Tensor | None = None
        for owner, part in enumerate(turn):
            whole = self._gather(part, owner)
            if owner == self._rank.rank:
                mine = self._matrix.direct(whole.view(part.shape)).reshape(-1)
            del whole
        for owner, part in enumerate(turn):
            if owner == self._rank.rank:
                assert mine is not None
                direction = mine
            else:
                direction = torch.empty(math.prod(part.shape), device=self._rank.device)
            if self._rank.world_size > 1:
                torch.distributed.broadcast(direction, src=owner)
            if part.numel:
                part.gradient().copy_(direction.narrow(0, part.start, part.numel))

    def _gather(self, part: MatrixPart, owner: int) -> torch.Tensor:
        """Bring all elements of a matrix to its owner. Shape (elements,), there alone of use."""
        if part.is_whole and self._is_everywhere:
            return part.gradient().to(self._rank.device)
        whole = torch.zeros(math.prod(part.shape), device=self._rank.device)
        if part.numel:
            whole.narrow(0, part.start, part.numel).copy_(part.gradient())
        if self._rank.world_size > 1:
            # Every element is that of one rank, and 0 on all others.
            torch.distributed.reduce(whole, dst=owner)
        return whole


def _members(optimizer: Any, zero_stage: int) -> Iterator[tuple[torch.Tensor, list[Any]]]:
    """Yield the tensors that the optimizer updates, each with the parameters that it is cut from.

    All ranks list the same parameters in the same order, whichever they have elements of.
    """
    if zero_stage == 3:
        yield from zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
    elif zero_stage > 0:
        yield from zip(
            optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True
        )
    elif hasattr(optimizer, "fp32_groups"):
        masters, halves = chain(*optimizer.fp32_groups), chain(*optimizer.fp16_groups)
        yield from ((master, [half]) for master, half in zip(masters, halves, strict=True))
    else:
        # fp32: the parameters are their own masters.
        groups = getattr(optimizer, "optimizer", optimizer).param_groups
        yield from ((p, [p]) for group in groups for p in group["params"])

"""A torch optimizer around a rule that updates whole parameters, whose states have other shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llmtune.engine.optimizers.elementwise_optimizer import ElementwiseOptimizer
from llmtune.optimizer.update import Update


class WholeOptimizer(ElementwiseOptimizer):
    """Makes the steps of an optimizer that has ``state_shapes``, in stage 0."""

    def _updates(self, group: dict[str, Any]) -> Iterator[Update]:
        """Count the step of each parameter, and yield one parameter at a time."""
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            names = self._rule.shapes_of(tuple(parameter.shape))
            if not state:
                state["step"] = 0
                for name, shape in names.items():
                    state[name] = torch.zeros(shape, device=parameter.device)
            state["step"] += 1
            yield Update(
                parameters=[parameter],
                gradients=[parameter.grad],
                states={name: [state[name]] for name in names},
                step=state["step"],
                settings=group,
            )

"""An optimizer that nobody needs: AdamW without bias correction."""

from __future__ import annotations

from llmtune.optimizer.optimizer import OPTIMIZERS, Optimizer
from llmtune.optimizer.update import Update


def _update(update: Update) -> None:
    import torch

    rate, (beta1, beta2) = update.settings["lr"], update.settings["betas"]
    squares, means = update.states["square"], update.states["mean"]
    torch._foreach_lerp_(means, update.gradients, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, update.gradients, update.gradients, 1 - beta2)
    lengths = torch._foreach_sqrt(squares)
    torch._foreach_add_(lengths, update.settings["eps"])
    torch._foreach_mul_(update.parameters, 1 - rate * update.settings["weight_decay"])
    torch._foreach_addcdiv_(update.parameters, means, lengths, -rate)


OPTIMIZERS.register(
    Optimizer(
        name="plain_adam",
        title="Adam without bias correction",
        states=("square", "mean"),
        update=_update,
    )
)

"""The update rule of AdamW, for those that do not store fp32 (https://arxiv.org/abs/1711.05101)."""

from __future__ import annotations

from llmtune.optimizer.update import Update


def update_adamw(update: Update) -> None:
    """Follow algorithm 2 of the paper, with torch's kernels for many tensors at a time.

    The order of the operations is that of ``torch/optim/adamw.py``.
    """
    import torch

    settings, step = update.settings, update.step
    rate, (beta1, beta2) = settings["lr"], settings["betas"]
    means, squares = update.states["exp_avg"], update.states["exp_avg_sq"]
    torch._foreach_mul_(update.parameters, 1 - rate * settings["weight_decay"])
    torch._foreach_lerp_(means, update.gradients, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, update.gradients, update.gradients, 1 - beta2)
    denominators = torch._foreach_sqrt(squares)
    torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(denominators, settings["eps"])
    torch._foreach_addcdiv_(update.parameters, means, denominators, -rate / (1 - beta1**step))

"""Lion: the sign of a momentum, with one state per parameter (https://arxiv.org/abs/2302.06675).

DeepSpeed 0.19.8's own two are not used. ``ops/lion/fused_lion.py`` is for CUDA alone, and is
compiled with nvcc. ``ops/lion/cpu_lion.py: DeepSpeedCPULion.step`` allocates a second state that
nothing reads, so that as much memory is taken as by Adam; and a fallback from the one to the other
would change digits.
"""

from __future__ import annotations

from llmtune.optimizer.optimizer import OPTIMIZERS, Optimizer
from llmtune.optimizer.update import Update


def _update(update: Update) -> None:
    """Follow algorithm 2 of the paper, with torch's kernels for many tensors at a time."""
    import torch

    rate, (beta1, beta2) = update.settings["lr"], update.settings["betas"]
    momenta = update.states["exp_avg"]
    directions = torch._foreach_lerp(momenta, update.gradients, 1 - beta1)
    torch._foreach_sign_(directions)
    torch._foreach_mul_(update.parameters, 1 - rate * update.settings["weight_decay"])
    torch._foreach_add_(update.parameters, directions, alpha=-rate)
    torch._foreach_lerp_(momenta, update.gradients, 1 - beta2)


OPTIMIZERS.register(
    Optimizer(
        name="lion",
        title="Lion",
        states=("exp_avg",),
        reads=("betas", "weight_decay"),
        update=_update,
        # Of the five kernels, and the weight's copy in 16 bits: 36 ms for 40 M parameters on a CPU
        # where torch's AdamW (30 bytes) takes 20.
        kernel_bytes=12 + 8 + 8 + 12 + 12 + 2,
        # Every element moves by the whole rate in every step: the paper takes 3 to 10 times less
        # than for AdamW.
        learning_rate_scale=0.2,
    )
)

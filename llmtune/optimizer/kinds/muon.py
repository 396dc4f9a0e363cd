"""Muon: momentum that is made orthogonal, for the matrices of layers (Keller Jordan, 2024).

See https://kellerjordan.github.io/posts/muon/. All other parameters have AdamW.

DeepSpeed 0.19.8's own is not used. It makes the update orthogonal before gradients are clipped
(``runtime/zero/stage_1_and_2.py: get_flat_partition``, ``stage3.py:
_apply_muon_to_accumulated_grads``), so that ``gradient_clipping`` takes the norm of the update,
which is the root of the sum of all ranks of matrices, and makes every step as much smaller. Stage 0
clips before, and takes other steps than the other stages.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from llmtune.optimizer.adamw_rule import update_adamw
from llmtune.optimizer.optimizer import OPTIMIZERS, MatrixRule, Optimizer
from llmtune.optimizer.update import Update

if TYPE_CHECKING:
    import torch

#: Coefficients and steps of the Newton-Schulz iteration (the post, and ``torch.optim.Muon``).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_EPSILON = 1e-7


def _blend(update: Update) -> None:
    """Average the gradients, and look ahead by Nesterov's formula."""
    import torch

    momentum, averages = update.settings["momentum"], update.states["momentum_buffer"]
    torch._foreach_lerp_(averages, update.gradients, 1 - momentum)
    torch._foreach_lerp_(update.gradients, averages, momentum)


def _direct(matrices: torch.Tensor) -> torch.Tensor:
    """Make matrices orthogonal, and as large as AdamW's steps. Shape (matrices, rows, columns).

    The size is that of ``torch.optim.Muon`` with ``match_rms_adamw``
    (https://arxiv.org/abs/2502.16982), so that one learning rate suits both rules.
    """
    a, b, c = _COEFFICIENTS
    rows, columns = matrices.shape[-2:]
    x = matrices.bfloat16()
    if rows > columns:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPSILON)
    for _ in range(_STEPS):
        gram = _add_product(None, x, x.mT)
        gram = _add_product(gram, gram, gram, beta=b, alpha=c)
        x = _add_product(x, gram, x, beta=a)
    if rows > columns:
        x = x.mT
    direction: torch.Tensor = x.float() * (0.2 * math.sqrt(max(rows, columns)))
    return direction


def _add_product(
    matrices: torch.Tensor | None,
    left: torch.Tensor,
    right: torch.Tensor,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> torch.Tensor:
    """Return ``beta * matrices + alpha * left @ right`` in bf16, added up in fp32.

    Without matrices it is the product alone.

    A GPU does so by itself. On a CPU without instructions for bf16 its kernels take 6 to 26 times
    as long as those of fp32, so that the same product is made there in fp32 and rounded once.
    """
    if left.is_cpu:
        matrices = matrices.float() if matrices is not None else None
        left, right = left.float(), right.float()
    if matrices is None:
        return (left @ right).bfloat16()
    return matrices.baddbmm(left, right, beta=beta, alpha=alpha).bfloat16()


def _count_flops(rows: int, columns: int) -> float:
    """Count the operations of the products in :func:`_direct`: two for each multiplication.

    A step multiplies the matrix with its transpose, the square of the shorter side with itself, and
    that with the matrix.
    """
    short, long = min(rows, columns), max(rows, columns)
    return _STEPS * (4.0 * short * short * long + 2.0 * short**3)


OPTIMIZERS.register(
    Optimizer(
        name="muon",
        title="AdamW",
        states=("exp_avg", "exp_avg_sq"),
        reads=("momentum", "betas", "eps", "weight_decay"),
        update=update_adamw,
        matrix=MatrixRule(
            title="Muon",
            states=("momentum_buffer",),
            blend=_blend,
            direct=_direct,
            flops=_count_flops,
        ),
        # The two kernels of the momentum, the decay, the step, and the weight's copy in 16 bits.
        kernel_bytes=12 + 12 + 8 + 12 + 2,
    )
)

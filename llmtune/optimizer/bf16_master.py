"""AdamW with bf16 master weights, whose variants differ in how the moments are stored."""

from __future__ import annotations

from dataclasses import replace

from llmtune.config.groups.optim import OptimConfig, Rounding
from llmtune.optimizer.adamw_rule import update_adamw
from llmtune.optimizer.optimizer import COMPENSATION, Optimizer
from llmtune.optimizer.storage import BF16, Storage

#: DeepSpeed 0.19.8: ``runtime/config.py`` refuses ``bf16_master_weights_and_grads`` without ZeRO.
_STAGES = (1, 2, 3)
_STAGES_REASON = "DeepSpeed has bf16 master weights in ZeRO 1 to 3 only; take zero=auto"


def make_adamw(
    *, name: str, title: str, mean: Storage, square: Storage, kernel_bytes: int
) -> Optimizer:
    """Make a variant.

    Args:
        mean: How the first moment is stored.
        square: How the second moment is stored.
        kernel_bytes: Bytes that a step reads and writes per parameter.
    """
    return Optimizer(
        name=name,
        title=title,
        states=("exp_avg", "exp_avg_sq"),
        storages={"exp_avg": mean, "exp_avg_sq": square},
        master=BF16,
        rounding=Rounding.stochastic,
        variant=_with_rounding,
        stages=_STAGES,
        stages_reason=_STAGES_REASON,
        reads=("betas", "eps", "weight_decay", "rounding"),
        update=update_adamw,
        kernel_bytes=kernel_bytes,
    )


def _with_rounding(optimizer: Optimizer, optim: OptimConfig) -> Optimizer:
    """Return the optimizer with the rounding that is set, and with the state that Kahan's needs."""
    if optim.rounding is not Rounding.kahan:
        return replace(optimizer, rounding=optim.rounding)
    return replace(
        optimizer,
        rounding=optim.rounding,
        states=(*optimizer.states, COMPENSATION),
        storages={**optimizer.storages, COMPENSATION: BF16},
    )

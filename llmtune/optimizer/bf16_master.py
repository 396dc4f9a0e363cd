"""The common part of optimizers with bf16 master weights: stages, and rounding."""

from __future__ import annotations

from dataclasses import replace

from llmtune.config.groups.optim import OptimConfig, Rounding
from llmtune.optimizer.optimizer import COMPENSATION, Optimizer
from llmtune.optimizer.storage import BF16

#: DeepSpeed 0.19.8: ``runtime/config.py`` refuses ``bf16_master_weights_and_grads`` without ZeRO.
BF16_MASTER_STAGES = (1, 2, 3)
BF16_MASTER_REASON = "DeepSpeed has bf16 master weights in ZeRO 1 to 3 only; take zero=auto"


def with_rounding(optimizer: Optimizer, optim: OptimConfig) -> Optimizer:
    """Return the optimizer with the rounding that is set, and with the state that Kahan's needs."""
    if optim.rounding is not Rounding.kahan:
        return replace(optimizer, rounding=optim.rounding)
    return replace(
        optimizer,
        rounding=optim.rounding,
        states=(*optimizer.states, COMPENSATION),
        storages={**optimizer.storages, COMPENSATION: BF16},
    )

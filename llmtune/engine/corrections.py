"""Where DeepSpeed 0.19.8 computes something other than it says. Each has a test that fails when upstream mends it."""

from __future__ import annotations

from typing import Any

import torch


def undo_stage0_dummy_step(optimizer: Any) -> bool:
    """Take back the optimizer step that stage 0 in bf16/fp16 makes while it is built; True if there was one.

    ``FP16_UnfusedOptimizer.initialize_optimizer_states`` calls ``step()`` on zero gradients. That counts as Adam's first
    step, so the bias correction of the real first step is that of the second (its update is 26 % too small at the usual
    betas), and it decays the master weights once. Stages 1 to 3 do not do this.
    """
    masters = getattr(optimizer, "fp32_groups", None)
    if masters is None:
        return False
    had_state = len(optimizer.optimizer.state) > 0
    optimizer.optimizer.state.clear()
    with torch.no_grad():
        for group, halves in zip(masters, optimizer.fp16_groups, strict=True):
            for master, half in zip(group, halves, strict=True):
                master.copy_(half)
    return had_state

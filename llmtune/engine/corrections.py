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


def replay_cpu_adam(optimizer: Any, steps: int) -> None:
    """Bring DeepSpeedCPUAdam's running products of the betas to where ``steps`` steps would have left them.

    The C++ kernel multiplies ``beta^t`` up step by step and, where the step jumps, falls back to ``pow``: one unit in
    the last place apart, enough for a resumed bf16 run to drift by 1e-4. Stepping over one-element tensors is exact.
    """
    kernel = getattr(optimizer, "ds_opt_adam", None)
    if kernel is None:
        return
    group = optimizer.param_groups[0]
    beta1, beta2 = group["betas"]
    zeros = [torch.zeros(1) for _ in range(4)]
    for step in range(1, steps + 1):
        kernel.adam_update(
            *(optimizer.opt_id, step, group["lr"], beta1, beta2, group["eps"], group["weight_decay"]),
            *(group["bias_correction"], *zeros),
        )

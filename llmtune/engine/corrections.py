"""Where DeepSpeed 0.19.8 computes something other than it says. Each has a test that fails when upstream mends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed


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


def keep_norm_precision(optimizer: Any) -> bool:
    """Add up the gradient norm in fp64 where the optimizer is offloaded, as without offload; True if that changed something.

    ``complete_grad_norm_calculation_for_cpu_offload`` (stages 1 to 3) sends the sum of squares through an fp32 tensor. The
    norm is then off by one part in 10^8, the clipped gradients by a last digit, and in bf16 the loss curve of an offloaded
    run drifts from that of the same run without offload.
    """
    if not hasattr(optimizer, "norm_for_param_grads"):
        return False

    def complete(parameters: Sequence[Any]) -> torch.Tensor:
        """2-norm of this group's gradients over all ranks; -1 where it is not finite, as DeepSpeed wants it."""
        norms = optimizer.norm_for_param_grads
        squares = [float(norms[key]) ** 2 for key in map(optimizer.get_param_id, parameters) if key in norms]
        total = torch.tensor(sum(squares), dtype=torch.float64, device=optimizer.device)
        torch.distributed.all_reduce(total, group=optimizer.dp_process_group)
        norm = total.sqrt()
        return norm.cpu() if bool(torch.isfinite(norm)) else torch.tensor(-1.0, dtype=torch.float64)

    optimizer.complete_grad_norm_calculation_for_cpu_offload = complete
    return True

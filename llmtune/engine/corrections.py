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


def keep_norm_precision(optimizer: Any, zero_stage: int) -> bool:
    """Add up the gradient norm in fp64 in every stage and placement, as stage 3 without offload does; True if that is a change.

    ``complete_grad_norm_calculation_for_cpu_offload`` (stages 1 to 3) and ``get_grad_norm_direct`` of stages 1 and 2 send the
    sum of squares through fp32. The norm is then off by one part in 10^8, the clipped gradients by a last digit, and in bf16
    the loss curve drifts from that of the same run on another rung of the ladder.
    """
    if zero_stage == 0:
        return False
    from deepspeed.accelerator import get_accelerator

    def over_ranks(squares: torch.Tensor) -> torch.Tensor:
        """The 2-norm; -1 where it is not finite, as DeepSpeed wants it. The host does not wait for it."""
        # Not on ``optimizer.device``, which is the host where the optimizer is offloaded: NCCL takes no tensor of the host.
        total = squares.to(get_accelerator().current_device_name())
        torch.distributed.all_reduce(total, group=optimizer.dp_process_group)
        norm = total.sqrt()
        return torch.where(torch.isfinite(norm), norm, -1.0)

    if hasattr(optimizer, "norm_for_param_grads"):

        def offloaded(parameters: Sequence[Any]) -> torch.Tensor:
            """Norms were noted when the gradients passed by. On the host, as the gradients that are clipped by it."""
            norms = optimizer.norm_for_param_grads
            keys = map(optimizer.get_param_id, parameters)
            return over_ranks(_sum_of_squares([norms[key] for key in keys if key in norms])).cpu()

        optimizer.complete_grad_norm_calculation_for_cpu_offload = offloaded
        return True
    if zero_stage < 3:

        def direct(gradients: Sequence[torch.Tensor], _: Any, norm_type: float = 2) -> torch.Tensor:
            """Of this rank's slices; padding is zero."""
            assert norm_type == 2
            slices = [gradient.detach() for gradient in gradients]
            return over_ranks(_sum_of_squares(torch._foreach_norm(slices, 2, torch.float64) if slices else []))

        optimizer.get_grad_norm_direct = direct
        return True
    return False


def _sum_of_squares(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of scalars, in fp64; on their own device, with one kernel for all of them."""
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([norm.double() for norm in norms]).square().sum()

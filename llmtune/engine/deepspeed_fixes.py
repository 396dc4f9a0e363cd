"""Corrections of DeepSpeed 0.19.8, where it computes something other than it documents.

Each has a test that fails when upstream fixes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed


@contextmanager
def share_weights_with_masters() -> Iterator[None]:
    """Let weights be their own master weights in stage 3, where both have the same dtype.

    ``stage3.py: _create_fp32_partitions`` means to take them as they are, and asks whether
    ``tensor.device == self.device``. That is a ``torch.device`` and a text, which are never equal,
    so that it makes a copy: 2 bytes per trained parameter in bf16, 4 in fp32. Within that method
    the device is a ``torch.device`` here. With the optimizer on the host nothing changes.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    create = Stage3._create_fp32_partitions

    def create_shared(self: Any) -> None:
        device = self.device
        if not self.offload_optimizer:
            self.device = torch.device(device)
        try:
            create(self)
        finally:
            self.device = device

    Stage3._create_fp32_partitions = create_shared
    try:
        yield
    finally:
        Stage3._create_fp32_partitions = create


@contextmanager
def allow_bf16_masters() -> Iterator[None]:
    """Let an optimizer that is not DeepSpeed's have bf16 master weights on the host.

    ``base_optimizer.py: _configure_master_weights`` takes no other than ``DeepSpeedCPUAdam`` there,
    which rounds to the nearest. What ZeRO does with master weights is the same for all.
    """
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    configure = ZeROOptimizer._configure_master_weights

    def configure_any(self: Any, **settings: Any) -> torch.dtype:
        dtype: torch.dtype = configure(self, **{**settings, "bf16_offload_validator": None})
        return dtype

    ZeROOptimizer._configure_master_weights = configure_any
    try:
        yield
    finally:
        ZeROOptimizer._configure_master_weights = configure


def undo_stage0_dummy_step(optimizer: Any) -> bool:
    """Take back the optimizer step that stage 0 in bf16/fp16 makes while it is built.

    ``FP16_UnfusedOptimizer.initialize_optimizer_states`` calls ``step()`` on zero gradients. That
    counts as Adam's first step, so the bias correction of the real first step is that of the second
    (its update is 26 % too small at the usual betas), and it decays the master weights once. Stages
    1 to 3 do not do this.

    Returns:
        Whether there was such a step.
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


def missing_loss_scale(optimizer: Any) -> float:
    """Return the factor of the loss before ``engine.backward``: the scale of stage 0 in fp16, or 1.

    ``DeepSpeedEngine.backward`` scales the loss for ZeRO's optimizers only, but
    ``FP16_UnfusedOptimizer.step`` divides the gradient by the scale: it is 65,536 times too small,
    below what fp16 can hold, never clipped, and next to Adam's epsilon.
    """
    scaler = getattr(optimizer, "loss_scale_config", None)
    return 1.0 if scaler is None else float(scaler.cur_scale)


def step_in_few_kernels(optimizer: Any) -> bool:
    """Make the step of stage 0 in bf16/fp16 with one kernel for all tensors at a time.

    ``FP16_UnfusedOptimizer.step`` goes through the tensors one by one, some 25 kernels and a wait
    for the GPU for each: with the 448 tensors of an 8B model's adapters 50 ms per step. The result
    is the same, except for the norm, which is added up in fp64 as in the other stages. Gradients
    are unpartitioned and equal on every rank, and so is what follows from them.

    Returns:
        Whether the optimizer has such a step.
    """
    if not hasattr(optimizer, "fp32_groups"):
        return False
    masters, halves = list(chain(*optimizer.fp32_groups)), list(chain(*optimizer.fp16_groups))

    def step(closure: None = None) -> bool:  # noqa: ARG001 - DeepSpeed passes it
        # The overflow check and the norm, with one wait for the GPU.
        trained = [half for half in halves if half.grad is not None]
        norm = float(_sum_of_squares(norms_of([half.grad for half in trained])).sqrt())
        if not math.isfinite(norm):
            optimizer.overflow = True
            return bool(optimizer._skip_invalid_grad_norm())

        # The factor of unscaling and clipping, by DeepSpeed's own formula; it is applied below.
        optimizer.overflow = False
        optimizer._global_grad_norm = norm / optimizer.loss_scale_config.cur_scale
        scale = optimizer.unscale_and_clip_grads(norm, apply_scale=False)
        # DeepSpeed does this earlier: see :func:`grow_loss_scale_behind_step`.
        optimizer._update_scale(False)

        # Gradients to fp32, the optimizer step, and the master weights back to the model.
        with torch.no_grad():
            gradients = [torch.zeros_like(master) for master in masters]
            pairs = [
                (gradient, half.grad)
                for gradient, half in zip(gradients, halves, strict=True)
                if half.grad is not None
            ]
            torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])
            torch._foreach_mul_(gradients, 1.0 / scale)
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = gradient
            optimizer.optimizer.step()
            for master in masters:
                master.grad = None
            torch._foreach_copy_(halves, masters)
        return False

    optimizer.step = step
    return True


def grow_loss_scale_behind_step(optimizer: Any) -> bool:
    """Let the loss scale grow after the step, in fp16 under ZeRO.

    Stages 1 to 3 double the scale, every 1,000 steps without an overflow, before they divide the
    gradients by it: those of that step, which were made with the scale before, count half, are
    clipped half as much, and stage 3 reports half their norm.

    Returns:
        Whether that changes the optimizer.
    """
    if not getattr(getattr(optimizer, "loss_scaler", None), "dynamic", False):
        return False
    update, step = optimizer._update_scale, optimizer.step
    waiting: list[bool] = []

    # Called by DeepSpeed inside its step, before the gradients are divided.
    def note(has_overflow: bool = False) -> None:
        if has_overflow:
            # This step is skipped, so that nothing is divided by the scale.
            update(has_overflow)
        else:
            waiting.append(has_overflow)

    def step_and_grow(*arguments: Any, **named: Any) -> Any:
        waiting.clear()
        result = step(*arguments, **named)
        if waiting:
            update(waiting.pop())
        return result

    optimizer._update_scale = note
    optimizer.step = step_and_grow
    return True


def keep_overflow_on_device(optimizer: Any) -> bool:
    """Check once per step, not per tensor, whether gradients sent to the host were finite.

    ``update_offload_overflow_tracker`` of stages 1 and 2 waits for the GPU with every tensor of
    every micro-batch.

    Returns:
        Whether that changes the optimizer.
    """
    if not hasattr(optimizer, "update_offload_overflow_tracker") or not getattr(
        optimizer, "cpu_offload", False
    ):
        return False
    seen: list[torch.Tensor] = []
    has_overflow, reset = optimizer.has_overflow, optimizer.reset_cpu_buffers

    # Called per gradient: adds to a flag on the device.
    def track(gradient: torch.Tensor | None) -> None:
        if gradient is not None:
            overflows = optimizer._has_inf_or_nan(gradient.data)
            seen[:] = [seen[0].logical_or(overflows) if seen else overflows]

    # Called once per step: waits for the flag.
    def ask(*arguments: Any, **named: Any) -> bool:
        optimizer.local_overflow = bool(seen) and bool(seen[0])
        return bool(has_overflow(*arguments, **named))

    # Called when the gradients on the host are reset.
    def forget() -> None:
        seen.clear()
        reset()

    optimizer.update_offload_overflow_tracker = track
    optimizer.has_overflow = ask
    optimizer.reset_cpu_buffers = forget
    return True


def keep_norm_precision(optimizer: Any, zero_stage: int) -> bool:
    """Add up the gradient norm in fp64 in all stages and placements, as stage 3 on a GPU does.

    ``complete_grad_norm_calculation_for_cpu_offload`` (stages 1 to 3) and ``get_grad_norm_direct``
    of stages 1 and 2 send the sum of squares through fp32. The norm is then off by one part in
    10^8, the clipped gradients by a last digit, and in bf16 the loss curve drifts from that of the
    same run on another rung of the ladder.

    Returns:
        Whether that changes the optimizer.
    """
    if zero_stage == 0:
        return False
    from deepspeed.accelerator import get_accelerator

    def over_ranks(squares: torch.Tensor) -> torch.Tensor:
        """The 2-norm; -1 where it is not finite, as DeepSpeed expects. The host does not wait."""
        # Not on ``optimizer.device``, which is the host where the optimizer is offloaded: NCCL
        # takes no tensor of the host.
        total = squares.to(get_accelerator().current_device_name())
        torch.distributed.all_reduce(total, group=optimizer.dp_process_group)
        norm = total.sqrt()
        return torch.where(torch.isfinite(norm), norm, -1.0)

    # Stages 1 to 3 with gradients on the host.
    if hasattr(optimizer, "norm_for_param_grads"):

        def offloaded(parameters: Sequence[Any]) -> torch.Tensor:
            """The norm from those that were noted per gradient.

            It is on the host, as are the gradients that are clipped by it.
            """
            norms = optimizer.norm_for_param_grads
            keys = map(optimizer.get_param_id, parameters)
            return over_ranks(_sum_of_squares([norms[key] for key in keys if key in norms])).cpu()

        optimizer.complete_grad_norm_calculation_for_cpu_offload = offloaded
        return True

    # Stages 1 and 2 on the device; stage 3 adds up in fp64 there by itself.
    if zero_stage < 3:

        def direct(gradients: Sequence[torch.Tensor], _: Any, norm_type: float = 2) -> torch.Tensor:
            """The norm of this rank's slices; padding is zero."""
            assert norm_type == 2
            slices = [gradient.detach() for gradient in gradients]
            return over_ranks(_sum_of_squares(norms_of(slices)))

        optimizer.get_grad_norm_direct = direct
        return True
    return False


def norms_of(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Compute the 2-norms of tensors in fp64, with one kernel for all of them."""
    return torch._foreach_norm(list(tensors), 2, torch.float64) if tensors else []


def _sum_of_squares(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum the squares of scalars in fp64, on their device, with one kernel for all of them."""
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([norm.double() for norm in norms]).square().sum()

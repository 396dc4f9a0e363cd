"""Bytes of ZeRO's states on one rank, by the device that holds them.

They are weights, gradients, master weights, the optimizer's states and buffers.

There is one function per stage and placement of the optimizer (stage 3 in
:mod:`llmtune.plan.memory.zero3_states`). Each names the functions of DeepSpeed 0.19.8 that allocate
what it counts; paths are relative to ``deepspeed/runtime/``. ``tests/engine/test_states.py``
compares the result with the tensors of a live engine and with its swap folder.
"""

from llmtune.optimizer.optimizer import FP32_BYTES
from llmtune.plan.memory.parameter_groups import partition_numel
from llmtune.plan.memory.placement import Placement
from llmtune.plan.memory.rank_bytes import (
    Arithmetic,
    Split,
    StateBytes,
    step_gradient_bytes,
)
from llmtune.plan.memory.shapes import ModelShape
from llmtune.plan.memory.zero3_states import (
    partition_states,
    stage_3_on_device,
    stage_3_on_host,
    stage_3_on_nvme,
)
from llmtune.plan.memory.zero_buffers import ZeroSizes


def state_bytes(
    shape: ModelShape,
    placement: Placement,
    sizes: ZeroSizes,
    arithmetic: Arithmetic,
    world_size: int,
    accumulation_steps: int = 1,
) -> StateBytes:
    """Count the bytes that one rank allocates for the model's states."""
    size = arithmetic.element_bytes
    if placement.zero_stage == 0:
        return _without_zero(shape, arithmetic)
    if placement.zero_stage < 3:
        if placement.optimizer == "none":
            return _stages_1_and_2_on_device(shape, sizes, arithmetic, world_size)
        accumulates_on_host = placement.zero_stage == 2 and accumulation_steps > 1
        return _stages_1_and_2_on_host(shape, sizes, arithmetic, world_size, accumulates_on_host)
    partitions = partition_states(shape, placement, sizes, size, world_size)
    if placement.optimizer == "none":
        return stage_3_on_device(partitions, arithmetic)
    if placement.optimizer == "cpu":
        return stage_3_on_host(partitions, arithmetic.optimizer)
    return stage_3_on_nvme(partitions, shape, sizes, arithmetic, world_size)


def _without_zero(shape: ModelShape, arithmetic: Arithmetic) -> StateBytes:
    """Stage 0: every rank has everything.

    fp32 is trained by torch's optimizer alone. In 16 bits ``fp16/unfused_optimizer.py:
    FP16_UnfusedOptimizer.__init__`` makes master weights, and its ``step`` fp32 gradients.
    """
    trained, size = shape.trainable_parameters, arithmetic.element_bytes
    has_master_weights = size < FP32_BYTES
    weights, adapters = _unpartitioned_weights(shape, size)
    optimizer_bytes = arithmetic.optimizer.state_bytes
    if has_master_weights:
        optimizer_bytes = arithmetic.optimizer.master_and_state_bytes
    return StateBytes(
        weights=weights,
        adapters=adapters,
        gradients=Split(size * trained),
        optimizer=Split(int(optimizer_bytes * trained)),
        step=FP32_BYTES * trained if has_master_weights else 0,
    )


def _stages_1_and_2_on_device(
    shape: ModelShape, sizes: ZeroSizes, arithmetic: Arithmetic, world_size: int
) -> StateBytes:
    """Stages 1 and 2 without offload.

    ``zero/stage_1_and_2.py``: ``__init__`` (``single_partition_of_fp32_groups``),
    ``copy_grads_in_partition`` (gradients), ``step`` (flattened and fp32 gradients).
    """
    share, size = partition_numel(shape.trainable_parameters, world_size), arithmetic.element_bytes
    weights, adapters = _unpartitioned_weights(shape, size)
    return StateBytes(
        weights=weights,
        adapters=adapters,
        gradients=Split(size * share),
        optimizer=Split(int(arithmetic.optimizer.master_and_state_bytes * share)),
        backward=_reduction_bytes(shape, sizes, size),
        step=step_gradient_bytes(share, arithmetic),
    )


def _stages_1_and_2_on_host(
    shape: ModelShape,
    sizes: ZeroSizes,
    arithmetic: Arithmetic,
    world_size: int,
    accumulates_on_host: bool,
) -> StateBytes:
    """Stages 1 and 2 with the optimizer on the host.

    ``zero/stage_1_and_2.py``: ``__init__`` (``single_partition_of_fp32_groups``,
    ``param_buffer_of_bit16_for_cpu_offload_groups``, ``temp_grad_buffer_for_cpu_offload`` and
    ``temp_grad_buffer_for_gpu_offload``), ``initialize_optimizer_states`` (gradients),
    ``async_accumulate_grad_in_cpu_via_gpu`` (``accumulated_grads_in_cpu``, in stage 2 only: stage 1
    accumulates in ``param.grad`` on the device, and reduces at the end; bf16 master weights'
    gradients are accumulated where they are).
    """
    share, size = partition_numel(shape.trainable_parameters, world_size), arithmetic.element_bytes
    weights, adapters = _unpartitioned_weights(shape, size)
    master_bytes = arithmetic.optimizer.master_bytes
    gradient = master_bytes * share
    copy_of_weights = size * share
    # One gradient in transfer, on either side.
    transfer = size * shape.largest_gradient
    master_and_states = int(arithmetic.optimizer.master_and_state_bytes * share)
    on_host = master_and_states + gradient + copy_of_weights + transfer
    accumulates = accumulates_on_host and master_bytes == FP32_BYTES
    return StateBytes(
        weights=weights,
        adapters=adapters,
        gradients=Split(host=size * share) if accumulates else Split(),
        optimizer=Split(device=transfer, host=on_host),
        backward=_reduction_bytes(shape, sizes, size),
        pinned=(gradient, copy_of_weights),
    )


def _unpartitioned_weights(shape: ModelShape, size: int) -> tuple[Split, Split]:
    """Weights of the base model and of the adapters."""
    return Split(shape.weight_bytes(size)), Split(size * shape.adapter_parameters)


def _reduction_bytes(shape: ModelShape, sizes: ZeroSizes, size: int) -> int:
    """The bucket of ``zero/stage_1_and_2.py: setup_buckets``, and the gradient copied into it.

    Where reductions overlap with the backward pass there are two buckets, and the one that is
    reduced has a flat copy (``allreduce_bucket``) while the other is filled.
    """
    buckets = 3 if sizes.overlaps else 1
    return size * (buckets * sizes.reduce_bucket + shape.largest_gradient)

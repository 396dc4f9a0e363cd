"""Bytes of ZeRO's states in stage 3, where weights are partitioned too.

There is one function per placement of the optimizer.

Paths of DeepSpeed 0.19.8 are relative to ``deepspeed/runtime/``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llmtune.optimizer.optimizer import FP32_BYTES, Optimizer
from llmtune.plan.memory.parameter_groups import (
    parameter_groups,
    partition_numel,
    rank_numel,
    sub_groups,
)
from llmtune.plan.memory.placement import Placement
from llmtune.plan.memory.rank_bytes import (
    Arithmetic,
    Split,
    StateBytes,
    step_gradient_bytes,
)
from llmtune.plan.memory.shapes import ModelShape, TensorShape
from llmtune.plan.memory.zero_buffers import ZeroSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Partitions:
    """Bytes that stage 3 allocates, whatever the optimizer's device."""

    weights: Split
    adapters: Split
    gradients: int
    """Bytes, on the optimizer's device."""
    buckets: Split
    backward: int
    left_on_nvme: int
    """Bytes of the weights on NVMe that are written once, while the model is built."""
    sub_group_numels: list[int]
    """Elements of this rank in each of the sub-groups that are stepped one after the other."""

    @property
    def share(self) -> int:
        """Trained elements of this rank."""
        return sum(self.sub_group_numels)


def partition_states(
    shape: ModelShape, placement: Placement, sizes: ZeroSizes, size: int, world_size: int
) -> Partitions:
    """Weights, gradients and buckets of stage 3.

    ``zero/stage3.py``: ``_create_fp16_sub_groups``; ``_setup_for_real_optimizer`` (bucket,
    ``grad_partitions_flat_buffer``); ``__add_grad_to_ipg_bucket`` (one unpartitioned gradient).
    ``zero/parameter_offload.py: mark_persistent_parameters`` (small weights that stay gathered).
    ``zero/partition_parameters.py: _partition_param_sec`` (hpZ's second partition).
    """
    # The sub-groups that are stepped one after the other, and this rank's elements of each.
    trained = [tensor for tensor in shape.tensors if tensor.trained]
    groups = parameter_groups(trained, placement, world_size)
    stepped = sub_groups(groups, world_size, sizes.sub_group)
    numels = [rank_numel(group, world_size) for group in stepped]

    # On one rank the partition of a small weight is the weight itself.
    persistent = 0
    if world_size > 1:
        stored = [tensor.stored_numel(size) for tensor in shape.tensors]
        persistent = sum(numel for numel in stored if numel <= sizes.persistence_threshold)
    buffers = 0
    if placement.param == "nvme":
        buffers = _param_buffers(stepped, sizes, size, world_size)

    base = [tensor for tensor in shape.tensors if not tensor.adapter]
    adapters = [tensor for tensor in shape.tensors if tensor.adapter]
    left = _tied_head_on_nvme(shape, placement, sizes, size, world_size)
    weights = _partitioned_weights(base, placement, sizes, size, world_size)
    weights += _second_partition(base, placement, sizes, size, world_size)
    return Partitions(
        weights=weights + Split(nvme=left),
        left_on_nvme=left,
        adapters=_partitioned_weights(adapters, placement, sizes, size, world_size),
        gradients=size * sum(numels),
        buckets=Split(device=size * (sizes.reduce_bucket + persistent), host=buffers),
        backward=size * shape.largest_gradient,
        sub_group_numels=numels,
    )


def _second_partition(
    tensors: Sequence[TensorShape],
    placement: Placement,
    sizes: ZeroSizes,
    size: int,
    world_size: int,
) -> Split:
    """Return the bytes of hpZ's slices, which are where the weights are.

    Trained ones are there from the first gather of a step on, until the optimizer changes the
    weights; adapters have none.
    """
    if sizes.secondary_ranks < 2:
        return Split()
    # Weights are padded for all ranks, and then cut for those that share the second partition.
    nbytes = sum(
        size
        * world_size
        * partition_numel(tensor.stored_numel(size), world_size)
        // sizes.secondary_ranks
        for tensor in tensors
    )
    return Split(device=nbytes) if placement.param == "none" else Split(host=nbytes)


def stage_3_on_device(partitions: Partitions, arithmetic: Arithmetic) -> StateBytes:
    """Stage 3 without offload of the optimizer.

    ``zero/stage3.py``: ``_create_fp32_partitions`` (weights of the master weights' dtype are their
    own master weights: :func:`llmtune.engine.deepspeed_fixes.share_weights_with_masters`),
    ``_prepare_fp32_grad_for_sub_group`` (one sub-group at a time).
    """
    optimizer = arithmetic.optimizer
    shared = optimizer.master_bytes == arithmetic.element_bytes
    nbytes = optimizer.state_bytes if shared else optimizer.master_and_state_bytes
    return StateBytes(
        weights=partitions.weights,
        adapters=partitions.adapters,
        gradients=Split(partitions.gradients),
        optimizer=Split(int(nbytes * partitions.share)),
        buckets=partitions.buckets,
        backward=partitions.backward,
        step=step_gradient_bytes(max(partitions.sub_group_numels), arithmetic),
    )


def stage_3_on_host(partitions: Partitions, optimizer: Optimizer) -> StateBytes:
    """Stage 3 with the optimizer on the host.

    ``zero/stage3.py``: ``_create_fp32_partitions``, ``initialize_optimizer_states`` (a pinned
    gradient per sub-group, in the master weights' dtype).
    """
    gradients = tuple(optimizer.master_bytes * numel for numel in partitions.sub_group_numels)
    master_and_states = int(optimizer.master_and_state_bytes * partitions.share)
    return StateBytes(
        weights=partitions.weights,
        adapters=partitions.adapters,
        gradients=Split(host=partitions.gradients),
        optimizer=Split(host=master_and_states + sum(gradients)),
        buckets=partitions.buckets,
        backward=partitions.backward,
        pinned=gradients,
    )


def stage_3_on_nvme(
    partitions: Partitions,
    shape: ModelShape,
    sizes: ZeroSizes,
    arithmetic: Arithmetic,
    world_size: int,
) -> StateBytes:
    """Stage 3 with an fp32 optimizer on NVMe; sub-groups below a block stay on the host.

    ``zero/stage3.py``: ``_create_fp32_partitions``, ``initialize_optimizer_states``.
    ``swap_tensor/optimizer_utils.py: OptimizerSwapper``: ``__init__`` (buffers),
    ``is_swappable_tensor``, ``_swap_out_gradients``.
    """
    # Sub-groups on the disk and on the host.
    master_and_state_bytes = int(arithmetic.optimizer.master_and_state_bytes)
    on_disk = on_host = 0
    for numel in partitions.sub_group_numels:
        if FP32_BYTES * numel >= sizes.aio.block_size:
            on_disk += master_and_state_bytes * _aligned(numel, sizes, FP32_BYTES)
        else:
            on_host += (master_and_state_bytes + FP32_BYTES) * numel

    # Gradients that are too small for the disk stay in memory until their sub-group has been
    # stepped. In fp32 they are the gradients of the flat buffer themselves.
    gradients_on_disk, small_gradients = _swapped_gradients(shape, sizes, world_size)
    if arithmetic.element_bytes == FP32_BYTES:
        small_gradients = 0

    # The swapper's buffers hold the largest sub-group.
    largest = _aligned(max(partitions.sub_group_numels), sizes, FP32_BYTES)
    swap_buffers = sizes.optimizer_buffers * FP32_BYTES * largest
    weights = partitions.weights.nvme - partitions.left_on_nvme
    written = on_disk + gradients_on_disk + weights + partitions.adapters.nvme
    return StateBytes(
        weights=partitions.weights,
        adapters=partitions.adapters,
        gradients=Split(host=partitions.gradients + small_gradients),
        optimizer=Split(host=on_host, nvme=on_disk + gradients_on_disk),
        buckets=partitions.buckets + Split(host=swap_buffers),
        backward=partitions.backward,
        nvme_written_per_step=written,
    )


def _partitioned_weights(
    tensors: list[TensorShape], placement: Placement, sizes: ZeroSizes, size: int, world_size: int
) -> Split:
    """Partitions in the training dtype (``zero/partition_parameters.py: Init._partition_param``).

    4-bit weights are partitioned with their scales
    (:class:`llmtune.model.nf4.nf4_linear.Nf4Linear`).
    Trained weights on NVMe stay on the host up to ``max_in_cpu`` (``zero/stage3.py:
    _create_param_groups_fp16_flat_cpu_memory``).
    """
    device = host = nvme = 0
    for tensor in tensors:
        partition = partition_numel(tensor.stored_numel(size), world_size)
        nbytes = size * partition
        stays_on_host = tensor.trained and sizes.max_in_cpu > 0
        if placement.param == "none":
            device += nbytes
        elif placement.param == "nvme" and nbytes >= sizes.aio.block_size and not stays_on_host:
            nvme += size * _aligned(partition, sizes, size)
        else:
            host += nbytes
    return Split(device, host, nvme)


def _tied_head_on_nvme(
    shape: ModelShape, placement: Placement, sizes: ZeroSizes, size: int, world_size: int
) -> int:
    """Bytes of the file that a tied head leaves on NVMe.

    transformers makes the head before it gives it the embedding's weight, and ``zero.Init`` swaps
    out every parameter as soon as it is made (``zero/partition_parameters.py:
    Init._partition_param``). Nothing reads the file again.
    """
    partition = partition_numel(shape.head_parameters, world_size)
    swaps = placement.param == "nvme" and size * partition >= sizes.aio.block_size
    return size * _aligned(partition, sizes, size) if shape.tied and swaps else 0


def _param_buffers(
    groups: list[list[TensorShape]], sizes: ZeroSizes, size: int, world_size: int
) -> int:
    """Bytes of the pinned buffers for weights on NVMe.

    ``swap_tensor/partitioned_param_swapper.py``: ``_configure_aio`` (for reading), and
    ``reserve_partitioned_swap_space`` (for writing), which ``zero/stage3.py:
    _create_fp16_partitions_with_defragmentation`` calls with the unpartitioned sizes of the
    largest sub-group.
    """
    nbytes = sizes.param_buffers * size * _aligned(sizes.param_buffer, sizes, size)
    if sizes.max_in_cpu:
        return nbytes
    largest = max(groups, key=lambda group: rank_numel(group, world_size))
    return nbytes + size * sum(_aligned(tensor.numel, sizes, size) for tensor in largest)


def _swapped_gradients(shape: ModelShape, sizes: ZeroSizes, world_size: int) -> tuple[int, int]:
    """Bytes of the fp32 gradients on disk, and of those that are too small for it.

    ``swap_tensor/optimizer_utils.py: _adjust_for_misaligned_lengths`` cuts a gradient in two where
    its length is not aligned; the rest stays in memory.
    """
    on_disk = in_memory = 0
    alignment = sizes.aio.alignment_bytes // FP32_BYTES
    for tensor in shape.tensors:
        if not tensor.trained:
            continue
        numel = partition_numel(tensor.numel, world_size)
        swapped = 0
        if FP32_BYTES * numel >= sizes.aio.block_size:
            swapped = numel // alignment * alignment
        on_disk += FP32_BYTES * swapped
        in_memory += FP32_BYTES * (numel - swapped)
    return on_disk, in_memory


def _aligned(numel: int, sizes: ZeroSizes, size: int) -> int:
    """Elements, rounded up to the alignment of the swapper (``_io_aligned_numel``)."""
    alignment = sizes.aio.alignment_bytes // size
    return -(-numel // alignment) * alignment

"""Bucket, prefetch, sub-group and swap buffer sizes of ZeRO, derived from the model; and the
sub-groups that follow.

All sizes are in elements. What DeepSpeed makes of them stands in its ``runtime/zero/stage3.py``
(sub-groups), ``partitioned_param_coordinator.py`` (live parameters, prefetch) and
``runtime/swap_tensor/`` (buffers).
"""

from __future__ import annotations

from dataclasses import dataclass

from llmtune.plan.memory.model_shape import ModelShape, TensorShape
from llmtune.plan.memory.placement import Placement

#: DeepSpeed swaps what has at least this many bytes (``swap_tensor/utils.py: MIN_AIO_BYTES``, or
#: the aio block).
MIN_SWAP_BYTES = 2**20
#: Lengths on disk are padded to this, times the threads of a request (``AIO_ALIGNED_BYTES``).
SWAP_ALIGNMENT_BYTES = 1024
#: A gradient is read back into the middle of a buffer by O_DIRECT, which wants this alignment; else
#: DeepSpeed trains on wrong gradients without a word.
SECTOR_BYTES = 512
#: Buffers of the optimizer's swapper: weights, two moments, gradient.
OPTIMIZER_SWAP_BUFFERS = 4
#: Weights in flight between NVMe and the accelerator.
PARAM_SWAP_BUFFERS = 6


@dataclass(frozen=True, slots=True)
class AioSizes:
    """How DeepSpeed talks to the disk; the keys that its ``aio`` section really reads."""

    block_size: int = MIN_SWAP_BYTES
    queue_depth: int = 32
    intra_op_parallelizm: int = 1

    @property
    def alignment_bytes(self) -> int:
        """What lengths of swapped tensors are padded to."""
        return SWAP_ALIGNMENT_BYTES * self.intra_op_parallelizm


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroSizes:
    """Everything that tunes ZeRO for one model, placement and number of ranks."""

    reduce_bucket: int
    allgather_bucket: int
    sub_group: int
    max_live: int
    max_reuse_distance: int
    prefetch: int
    persistence_threshold: int
    param_buffer: int
    """Elements of one swap buffer for weights on NVMe: at least the largest partition."""
    max_in_cpu: int
    """Trained weights that stay on the host although weights are on NVMe."""
    aio: AioSizes
    optimizer_buffers: int = OPTIMIZER_SWAP_BUFFERS
    param_buffers: int = PARAM_SWAP_BUFFERS


def partition_numel(numel: int, world_size: int) -> int:
    """Elements of a rank's slice, padding included."""
    return -(-numel // world_size)


def resolve_zero_sizes(
    shape: ModelShape, placement: Placement, world_size: int, accelerator: str
) -> ZeroSizes:
    """The sizes for this model: a layer in use and one in flight, adapters resident, buffers as
    large as the largest slice.
    """
    largest = partition_numel(shape.largest_tensor, world_size)
    aio = AioSizes(intra_op_parallelizm=4 if accelerator == "cuda" else 1)
    lengths = aio.alignment_bytes // 2
    sub_group = 100_000_000
    if placement.optimizer == "nvme":
        # Four buffers of the largest sub-group are held on the host; smaller groups than a quarter
        # of the largest tensor would not make them smaller.
        sub_group = min(sub_group, max(largest // 4, MIN_SWAP_BYTES))
    trained = partition_numel(shape.trainable_parameters, world_size)
    return ZeroSizes(
        reduce_bucket=_reduce_bucket(shape, placement),
        allgather_bucket=min(shape.trainable_parameters, 500_000_000),
        sub_group=sub_group,
        max_live=2 * shape.layer_parameters + shape.largest_tensor,
        # A layer stays between its recomputation and its backward pass; from NVMe it would hold on
        # to a swap buffer.
        max_reuse_distance=0
        if placement.param == "nvme"
        else max(1_000_000_000, 2 * shape.layer_parameters),
        # Weights on NVMe are fetched one module at a time: DeepSpeed's prefetch runs out of swap
        # buffers.
        prefetch=0 if placement.param == "nvme" else max(shape.layer_parameters * 7 // 20, 1),
        # Adapters stay on every rank: gathering them one by one is bound by latency, not by bytes.
        persistence_threshold=max(shape.largest_adapter_tensor, 10 * shape.hidden_size),
        param_buffer=-(-largest // lengths) * lengths,
        max_in_cpu=trained + shape.adapter_parameters if shape.adapter_parameters else 0,
        aio=aio,
    )


def _reduce_bucket(shape: ModelShape, placement: Placement) -> int:
    if placement.zero_stage < 3:
        return min(shape.trainable_parameters, 500_000_000)
    return max(shape.hidden_size**2, shape.largest_adapter_tensor, 1_000_000)


def parameter_groups(
    tensors: list[TensorShape], placement: Placement, world_size: int
) -> list[list[TensorShape]]:
    """The optimizer's parameter groups: matrices, then vectors, which do not decay.

    With the optimizer on NVMe the order is also what keeps gradients right: every matrix whose
    slice is no whole number of sectors stands in a group of its own, where its offset is 0, and
    vectors, which shift offsets, stand apart.
    """
    matrices = [tensor for tensor in tensors if tensor.trained and not tensor.vector]
    vectors = [tensor for tensor in tensors if tensor.trained and tensor.vector]
    odd: list[TensorShape] = []
    if placement.optimizer == "nvme":
        odd = [t for t in matrices if not is_sector_aligned(partition_numel(t.numel, world_size))]
        matrices = [t for t in matrices if is_sector_aligned(partition_numel(t.numel, world_size))]
    return [group for group in (matrices, *([tensor] for tensor in odd), vectors) if group]


def is_sector_aligned(numel: int) -> bool:
    """Whether so many fp32 elements fill whole sectors."""
    return numel * 4 % SECTOR_BYTES == 0


def sub_groups(
    groups: list[list[TensorShape]], world_size: int, sub_group_size: int
) -> list[list[TensorShape]]:
    """The sub-groups that stage 3 steps one after the other (``stage3.py:
    _create_fp16_sub_groups``).
    """
    found: list[list[TensorShape]] = []
    for group in groups:
        if sub_group_size >= rank_numel(group, world_size):
            found.append(group)
            continue
        current: list[TensorShape] = []
        held = 0
        for tensor in group:
            current.append(tensor)
            held += partition_numel(tensor.numel, world_size)
            if held >= sub_group_size:
                found.append(current)
                current, held = [], 0
        if current:
            found.append(current)
    return found


def rank_numel(tensors: list[TensorShape], world_size: int) -> int:
    """Elements that one rank holds of them."""
    return sum(partition_numel(tensor.numel, world_size) for tensor in tensors)

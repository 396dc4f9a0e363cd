"""ZeRO's bucket, prefetch, sub-group and swap buffer sizes for a model, and its sub-groups.

All sizes are in elements. DeepSpeed 0.19.8 uses them in ``runtime/zero/stage3.py`` (sub-groups),
``runtime/zero/partitioned_param_coordinator.py`` (live parameters, prefetch) and
``runtime/swap_tensor/`` (buffers).
"""

from dataclasses import dataclass

from llmtune.plan.memory.model_shape import ModelShape, TensorShape
from llmtune.plan.memory.placement import Placement

#: DeepSpeed swaps tensors of at least this many bytes (``swap_tensor/utils.py: MIN_AIO_BYTES``, or
#: the aio block).
MIN_SWAP_BYTES = 2**20
#: Lengths on disk are padded to this, times the threads of a request (``AIO_ALIGNED_BYTES``).
SWAP_ALIGNMENT_BYTES = 1024
#: A gradient is read back into the middle of a buffer by O_DIRECT, which needs this alignment; else
#: DeepSpeed silently trains on wrong gradients.
SECTOR_BYTES = 512
#: Buffers of the optimizer's swapper: weights, two moments, gradient.
OPTIMIZER_SWAP_BUFFERS = 4
#: Weights in flight between NVMe and the accelerator.
PARAM_SWAP_BUFFERS = 6


@dataclass(frozen=True, slots=True)
class AioSizes:
    """DeepSpeed's disk access: the keys that its ``aio`` section reads."""

    block_size: int = MIN_SWAP_BYTES
    queue_depth: int = 32
    intra_op_parallelism: int = 1

    @property
    def alignment_bytes(self) -> int:
        """The multiple to which lengths of swapped tensors are padded."""
        return SWAP_ALIGNMENT_BYTES * self.intra_op_parallelism


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroSizes:
    """ZeRO's sizes for one model, placement and number of ranks."""

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
    """Return the elements of a rank's slice, padding included."""
    return -(-numel // world_size)


def resolve_zero_sizes(
    shape: ModelShape, placement: Placement, world_size: int, accelerator: str
) -> ZeroSizes:
    """Derive the sizes for a model.

    One layer is in use and one in flight, adapters stay gathered, and buffers hold the largest
    slice.
    """
    largest = partition_numel(shape.largest_tensor, world_size)
    aio = AioSizes(intra_op_parallelism=4 if accelerator == "cuda" else 1)
    lengths = aio.alignment_bytes // 2
    sub_group = 100_000_000
    if placement.optimizer == "nvme":
        # Four buffers of the largest sub-group are held on the host; smaller groups than a quarter
        # of the largest tensor would not make them smaller.
        sub_group = min(sub_group, max(largest // 4, MIN_SWAP_BYTES))
    if placement.param == "nvme":
        # A layer kept for reuse would occupy a swap buffer, and DeepSpeed's prefetch runs out of
        # them, so that weights are fetched one module at a time.
        max_reuse_distance = prefetch = 0
    else:
        # A layer stays gathered between its recomputation and its backward pass.
        max_reuse_distance = max(1_000_000_000, 2 * shape.layer_parameters)
        prefetch = max(shape.layer_parameters * 7 // 20, 1)
    trained = partition_numel(shape.trainable_parameters, world_size)
    return ZeroSizes(
        reduce_bucket=_reduce_bucket(shape, placement),
        allgather_bucket=min(shape.trainable_parameters, 500_000_000),
        sub_group=sub_group,
        max_live=2 * shape.layer_parameters + shape.largest_tensor,
        max_reuse_distance=max_reuse_distance,
        prefetch=prefetch,
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
    """Return the optimizer's parameter groups: matrices, then vectors, which have no weight decay.

    With the optimizer on NVMe the groups also keep gradients right. A matrix whose slice is not a
    whole number of sectors has a group of its own, where its offset is 0, and vectors, which shift
    offsets, are apart.
    """
    matrices = [tensor for tensor in tensors if tensor.trained and not tensor.vector]
    vectors = [tensor for tensor in tensors if tensor.trained and tensor.vector]
    groups: list[list[TensorShape]] = [[]]
    for tensor in matrices:
        is_aligned = is_sector_aligned(partition_numel(tensor.numel, world_size))
        if placement.optimizer == "nvme" and not is_aligned:
            groups.append([tensor])
        else:
            groups[0].append(tensor)
    return [group for group in (*groups, vectors) if group]


def is_sector_aligned(numel: int) -> bool:
    """Tell whether ``numel`` fp32 elements fill whole sectors."""
    return numel * 4 % SECTOR_BYTES == 0


def sub_groups(
    groups: list[list[TensorShape]], world_size: int, sub_group_size: int
) -> list[list[TensorShape]]:
    """Split the groups into the sub-groups that stage 3 steps one after the other.

    Follows ``runtime/zero/stage3.py: _create_fp16_sub_groups``.
    """
    result: list[list[TensorShape]] = []
    for group in groups:
        if sub_group_size >= rank_numel(group, world_size):
            result.append(group)
            continue
        current: list[TensorShape] = []
        held = 0
        for tensor in group:
            current.append(tensor)
            held += partition_numel(tensor.numel, world_size)
            if held >= sub_group_size:
                result.append(current)
                current, held = [], 0
        if current:
            result.append(current)
    return result


def rank_numel(tensors: list[TensorShape], world_size: int) -> int:
    """Count the elements that one rank holds of these tensors."""
    return sum(partition_numel(tensor.numel, world_size) for tensor in tensors)

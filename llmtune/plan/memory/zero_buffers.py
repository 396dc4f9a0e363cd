"""ZeRO's bucket, prefetch, sub-group and swap buffer sizes for a model.

All sizes are in elements. DeepSpeed 0.19.8 uses them in ``runtime/zero/stage3.py`` (sub-groups),
``runtime/zero/partitioned_param_coordinator.py`` (live parameters, prefetch) and
``runtime/swap_tensor/`` (buffers).
"""

from dataclasses import dataclass

from llmtune.optimizer.optimizer import Optimizer
from llmtune.plan.memory.parameter_groups import partition_numel
from llmtune.plan.memory.placement import Placement
from llmtune.plan.memory.shapes import ModelShape

#: DeepSpeed swaps tensors of at least this many bytes (``swap_tensor/utils.py: MIN_AIO_BYTES``, or
#: the aio block).
MIN_SWAP_BYTES = 2**20
#: Lengths on disk are padded to this, times the threads of a request (``AIO_ALIGNED_BYTES``).
SWAP_ALIGNMENT_BYTES = 1024
#: Bytes of an element of the training dtype, by which weights in 4 bits are counted; in fp32 they
#: have half as many.
ELEMENT_BYTES = 2
#: Elements of a rank that stage 3 steps at once, unless states are on NVMe.
SUB_GROUP = 100_000_000
#: Most elements of a bucket of gradients, unless one gradient has more.
LARGEST_BUCKET = 500_000_000
#: Buckets of a small model at least, where their reductions overlap with the backward pass.
OVERLAPPED = 4
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
        """Return the multiple to which lengths of swapped tensors are padded."""
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
    overlaps: bool
    """Gradients are reduced while the backward pass goes on."""
    largest_gradient: int
    """Elements of the largest gradient that a bucket of a stage below 3 must hold to overlap."""
    secondary_ranks: int = 1
    """Ranks that hold a second partition of all weights among themselves (hpZ); 1 without it."""
    optimizer_buffers: int
    """Swap buffers of a sub-group for weights, states and gradient on NVMe."""
    param_buffers: int = PARAM_SWAP_BUFFERS


def resolve_zero_sizes(
    shape: ModelShape, placement: Placement, optimizer: Optimizer, world_size: int, accelerator: str
) -> ZeroSizes:
    """Derive the sizes for a model.

    One layer is in use and one in flight, adapters stay gathered, and buffers hold the largest
    slice.
    """
    largest = partition_numel(shape.largest_tensor, world_size)
    # ZeRO counts the elements of what it gathers: of a weight in 4 bits, those of its bytes.
    layer = shape.layer_bytes(ELEMENT_BYTES) // ELEMENT_BYTES
    aio = AioSizes(intra_op_parallelism=4 if accelerator == "cuda" else 1)
    lengths = aio.alignment_bytes // 2
    sub_group = SUB_GROUP
    if placement.optimizer == "nvme":
        # Three or four buffers of the largest sub-group are held on the host; smaller groups than a
        # quarter of the largest tensor would not make them smaller.
        sub_group = min(sub_group, max(largest // 4, MIN_SWAP_BYTES))
    if placement.param == "nvme":
        # A layer kept for reuse would occupy a swap buffer, and DeepSpeed's prefetch runs out of
        # them, so that weights are fetched one module at a time.
        max_reuse_distance = prefetch = 0
    else:
        # A layer stays gathered between its recomputation and its backward pass.
        max_reuse_distance = max(1_000_000_000, 2 * layer)
        prefetch = max(layer * 7 // 20, 1)
    trained = partition_numel(shape.trainable_parameters, world_size)
    reduce_bucket, overlaps = _reduce_bucket(shape, placement, world_size, accelerator)
    return ZeroSizes(
        reduce_bucket=reduce_bucket,
        allgather_bucket=_to_even(min(shape.trainable_parameters, 500_000_000)),
        sub_group=sub_group,
        max_live=2 * layer + shape.largest_tensor,
        max_reuse_distance=max_reuse_distance,
        prefetch=prefetch,
        # Adapters stay on every rank: gathering them one by one is bound by latency, not by bytes.
        persistence_threshold=max(shape.largest_adapter_tensor, 10 * shape.hidden_size),
        param_buffer=-(-largest // lengths) * lengths,
        max_in_cpu=trained + shape.adapter_parameters if shape.adapter_parameters else 0,
        aio=aio,
        overlaps=overlaps,
        largest_gradient=shape.largest_gradient if placement.zero_stage < 3 else 0,
        optimizer_buffers=optimizer.swap_buffers,
    )


def _to_even(numel: int) -> int:
    """Round up to an even number.

    DeepSpeed takes no odd allgather bucket (``stage_1_and_2.py``: ``nccl_start_alignment_factor``),
    and a head of three classes makes an odd model.
    """
    return numel + numel % 2


def _reduce_bucket(
    shape: ModelShape, placement: Placement, world_size: int, accelerator: str
) -> tuple[int, bool]:
    """Return the elements of a bucket of gradients, and whether its reduction is overlapped.

    The gradients of adapters go in one reduction, unless there are more than half a billion.

    Below stage 3 DeepSpeed 0.19.8 overlaps rightly as far as its source shows
    (``stage_1_and_2.py``), which versions before did not: the two buffers take turns
    (``IPGBucket.clear`` keeps ``index``), the reduction waits for all streams that filled a buffer
    (``copy_streams``), a buffer is filled again behind its reduction (``average_tensor``), and
    results live until they are used (``record_stream``). What is left out here:

    * A gradient larger than a bucket, whose memory is free again before its reduction has read it
      (``extra_large_param_to_reduce``). No bucket is smaller than the largest gradient.
    * Stage 1. With overlap it reduces only what has a gradient in the last micro-batch of a step,
      and leaves out what had one in an earlier micro-batch alone.
    * An optimizer on the host, to which gradients are copied behind their reduction.
    * A CPU, whose reductions wait in any case.
    """
    if placement.zero_stage == 3:
        return max(shape.hidden_size**2, shape.largest_adapter_tensor, 1_000_000), True
    trained = shape.trainable_parameters
    if (
        placement.zero_stage < 2
        or placement.optimizer != "none"
        or shape.adapter_parameters
        or world_size == 1
        or accelerator != "cuda"
    ):
        return min(trained, LARGEST_BUCKET), False
    bucket = max(shape.largest_gradient, min(trained // OVERLAPPED, LARGEST_BUCKET))
    return bucket, bucket < trained

"""Bytes of ZeRO's states on one rank: weights, gradients, master weights and moments, where they
live, and their buffers.

Follows what DeepSpeed 0.19.8 allocates (``runtime/zero/stage_1_and_2.py``, ``stage3.py``,
``swap_tensor/``); ``tests/engine/test_states.py`` walks the live engine's tensors and the swap
folder and compares.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmtune.config.schema import Precision
from llmtune.plan.memory.model_shape import ModelShape, TensorShape
from llmtune.plan.memory.placement import Placement
from llmtune.plan.memory.zero_buffers import (
    ZeroSizes,
    parameter_groups,
    partition_numel,
    rank_numel,
    sub_groups,
)

#: NF4 with double quantization: half a byte an element, one byte a block of 64, and four a block of
#: 256 blocks.
NF4_BYTES = 0.5
NF4_SCALE_BYTES = 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True, slots=True)
class Split:
    """Bytes of one rank by where they live."""

    device: int = 0
    host: int = 0
    nvme: int = 0

    def __add__(self, other: Split) -> Split:
        return Split(self.device + other.device, self.host + other.host, self.nvme + other.nvme)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBytes:
    """Of one rank, between two steps unless it says otherwise."""

    weights: Split
    """Of the base model."""
    adapters: Split
    gradients: Split
    """From the backward pass to the step."""
    optimizer: Split
    """Master weights and moments, and the fp32 gradient that an optimizer on the host keeps."""
    buckets: Split
    """Reduction buckets and the swapper's buffers."""
    backward: int
    """Device bytes of whole gradients on their way into a bucket."""
    step: int
    """Device bytes of the fp32 gradients that a step makes."""
    nvme_written_per_step: int
    pinned: tuple[int, ...] = ()
    """Blocks of pinned host memory among what the optimizer has there."""

    @property
    def total(self) -> Split:
        """What stands still: the sum of the first five."""
        return self.weights + self.adapters + self.gradients + self.optimizer + self.buckets


def element_bytes(precision: Precision) -> int:
    """Bytes of one element of weights, activations and gradients."""
    return 4 if precision is Precision.fp32 else 2


def state_bytes(
    shape: ModelShape,
    placement: Placement,
    sizes: ZeroSizes,
    precision: Precision,
    world_size: int,
    accumulation_steps: int = 1,
) -> StateBytes:
    """What one rank allocates for the model's states."""
    if placement.zero_stage == 3:
        return _stage3(shape, placement, sizes, precision, world_size)
    size = element_bytes(precision)
    trained = shape.trainable_parameters
    weights, adapters = _whole_weights(shape, size)
    if placement.zero_stage == 0:
        # fp32 has no separate master weights.
        optimizer = Split((8 if precision is Precision.fp32 else 12) * trained)
        step = 0 if precision is Precision.fp32 else 4 * trained
        return StateBytes(
            weights=weights,
            adapters=adapters,
            gradients=Split(size * trained),
            optimizer=optimizer,
            buckets=Split(),
            backward=0,
            step=step,
            nvme_written_per_step=0,
        )
    share = -(-trained // world_size)
    bucket = size * min(sizes.reduce_bucket, trained)
    largest = size * max(tensor.numel for tensor in shape.tensors if tensor.trained)
    if placement.optimizer == "none":
        gradients, optimizer = Split(size * share), Split(12 * share)
        # Flattened in the training dtype, then turned to fp32.
        step = 4 * share + (size * share if size < 4 else 0)
        return StateBytes(
            weights=weights,
            adapters=adapters,
            gradients=gradients,
            optimizer=optimizer,
            buckets=Split(),
            backward=bucket + largest,
            step=step,
            nvme_written_per_step=0,
        )
    # On the host: master weights, moments, fp32 gradients, a copy of the weights' share, and one
    # tensor on either side.
    optimizer = Split(largest, 16 * share + size * share + largest)
    # Stage 2 adds up micro-batches on the host, stage 1 in the flat buffer that it reduces at the
    # end.
    gradients = Split(
        0, size * share if accumulation_steps > 1 and placement.zero_stage == 2 else 0
    )
    pinned = (4 * share, size * share)
    return StateBytes(
        weights=weights,
        adapters=adapters,
        gradients=gradients,
        optimizer=optimizer,
        buckets=Split(),
        backward=bucket + largest,
        step=0,
        nvme_written_per_step=0,
        pinned=pinned,
    )


def _whole_weights(shape: ModelShape, size: int) -> tuple[Split, Split]:
    quantized = shape.quantized_parameters
    packed = int(quantized * (NF4_BYTES + NF4_SCALE_BYTES))
    return Split(size * (shape.parameters - quantized) + packed), Split(
        size * shape.adapter_parameters
    )


def _stage3(
    shape: ModelShape, placement: Placement, sizes: ZeroSizes, precision: Precision, world_size: int
) -> StateBytes:
    size = element_bytes(precision)
    trained = [tensor for tensor in shape.tensors if tensor.trained]
    groups = sub_groups(
        parameter_groups(trained, placement, world_size), world_size, sizes.sub_group
    )
    numels = [rank_numel(group, world_size) for group in groups]
    share, largest_group = sum(numels), max(numels)
    gradients = size * share
    resident = size * sum(t.numel for t in shape.tensors if t.numel <= sizes.persistence_threshold)
    if world_size == 1:
        # A whole tensor is its own slice.
        resident = 0
    bucket = Split(size * sizes.reduce_bucket + resident)
    backward = size * max(tensor.numel for tensor in trained)
    weights = _place_weights(
        [t for t in shape.tensors if not t.adapter], placement, sizes, size, world_size
    )
    adapters = _place_weights(
        [t for t in shape.tensors if t.adapter], placement, sizes, size, world_size
    )
    if placement.param == "nvme":
        bucket += Split(0, _param_buffers(groups, sizes, size, world_size))
    if placement.optimizer == "none":
        step = 4 * largest_group + (size * largest_group if size < 4 else 0)
        return StateBytes(
            weights=weights,
            adapters=adapters,
            gradients=Split(gradients),
            optimizer=Split(12 * share),
            buckets=bucket,
            backward=backward,
            step=step,
            nvme_written_per_step=0,
        )
    if placement.optimizer == "cpu":
        # Master weights, two moments and an fp32 gradient.
        optimizer = Split(0, 16 * share)
        # The fp32 gradient of each sub-group.
        pinned = tuple(4 * numel for numel in numels)
        return StateBytes(
            weights=weights,
            adapters=adapters,
            gradients=Split(0, gradients),
            optimizer=optimizer,
            buckets=bucket,
            backward=backward,
            step=0,
            nvme_written_per_step=0,
            pinned=pinned,
        )
    swapped = [_aligned(numel, sizes, 4) for numel in numels if 4 * numel >= sizes.aio.block_size]
    small = [numel for numel in numels if 4 * numel < sizes.aio.block_size]
    on_disk, in_memory = _swapped_gradients(trained, sizes, world_size)
    # Small gradients stay in memory until their sub-group has been stepped: in fp32, right where
    # they were reduced to.
    in_memory = in_memory if size < 4 else 0
    optimizer = Split(0, 16 * sum(small), 12 * sum(swapped) + on_disk)
    bucket += Split(0, sizes.optimizer_buffers * 4 * _aligned(largest_group, sizes, 4))
    written = 12 * sum(swapped) + on_disk + (weights.nvme + adapters.nvme)
    return StateBytes(
        weights=weights,
        adapters=adapters,
        gradients=Split(0, gradients + in_memory),
        optimizer=optimizer,
        buckets=bucket,
        backward=backward,
        step=0,
        nvme_written_per_step=written,
    )


def _place_weights(
    tensors: list[TensorShape], placement: Placement, sizes: ZeroSizes, size: int, world_size: int
) -> Split:
    """Partitions in the training dtype; 4-bit weights with their scales, which bitsandbytes leaves
    on every rank.
    """
    device = host = nvme = 0
    for tensor in tensors:
        partition = partition_numel(tensor.numel, world_size)
        nbytes = size * partition
        if tensor.quantized:
            nbytes = int(NF4_BYTES * partition)
            device += int(NF4_SCALE_BYTES * tensor.numel)
        if placement.param == "none":
            device += nbytes
        elif (
            placement.param == "nvme"
            and nbytes >= sizes.aio.block_size
            and not (tensor.trained and sizes.max_in_cpu)
        ):
            nvme += size * _aligned(partition, sizes, size)
        else:
            host += nbytes
    return Split(device, host, nvme)


def _param_buffers(
    groups: list[list[TensorShape]], sizes: ZeroSizes, size: int, world_size: int
) -> int:
    """Pinned buffers of weights on NVMe; the one for writing back holds a whole sub-group, not only
    this rank's slice.
    """
    nbytes = sizes.param_buffers * size * _aligned(sizes.param_buffer, sizes, size)
    if sizes.max_in_cpu:
        return nbytes
    largest = max(groups, key=lambda group: rank_numel(group, world_size))
    return nbytes + size * sum(_aligned(tensor.numel, sizes, size) for tensor in largest)


def _swapped_gradients(
    trained: list[TensorShape], sizes: ZeroSizes, world_size: int
) -> tuple[int, int]:
    """fp32 gradients on disk, and those too small for it; a length that is not aligned is cut in
    two.
    """
    on_disk = in_memory = 0
    alignment = sizes.aio.alignment_bytes // 4
    for tensor in trained:
        numel = partition_numel(tensor.numel, world_size)
        whole = numel // alignment * alignment if 4 * numel >= sizes.aio.block_size else 0
        on_disk += 4 * whole
        in_memory += 4 * (numel - whole)
    return on_disk, in_memory


def _aligned(numel: int, sizes: ZeroSizes, size: int) -> int:
    """Elements, rounded up to what DeepSpeed reads and writes at once."""
    step = sizes.aio.alignment_bytes // size
    return -(-numel // step) * step

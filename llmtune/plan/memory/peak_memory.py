"""Estimate the peak memory per rank by category, and the size of a checkpoint on disk.

Memories are the accelerator's, the host's and NVMe.

The accelerator's peak is the highest of four moments: the loss (all activations, logits), the
backward pass of a layer (all activations, the layer's working set, gathered weights, gradients
before they are reduced), the optimizer step, and, before all of them, the decomposition of a weight
with which an adapter begins. The categories add up to it: ``working_set``, ``step`` and ``start``
count only what exceeds the memory of the other moments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmtune.optimizer.optimizer import FP32_BYTES
from llmtune.plan.devices.gpus import pins_exactly
from llmtune.plan.devices.hardware import Hardware
from llmtune.plan.memory.memory_plan import DeviceBytes, HostBytes, MemoryPlan
from llmtune.plan.memory.parameter_groups import partition_numel
from llmtune.plan.memory.placement import Placement
from llmtune.plan.memory.rank_bytes import ActivationBytes, Arithmetic, StateBytes
from llmtune.plan.memory.shapes import ModelShape
from llmtune.plan.memory.zero_buffers import ZeroSizes
from llmtune.tuner.nf4_layout import BLOCK_SIZE
from llmtune.units import format_bytes

#: Share of a memory that a plan may fill; the rest is fragmentation, other processes, the operating
#: system.
USABLE_SHARE = 0.92

#: CUDA context, NCCL's and cuBLAS' buffers of one rank.
CUDA_RUNTIME_BYTES = 1_600_000_000
#: Python, torch and the libraries in one rank's host memory: with CUDA's, and of a CPU rank (0.75
#: GB measured).
HOST_RUNTIME_BYTES = {"cuda": 3_000_000_000, "cpu": 800_000_000}


@dataclass(frozen=True, slots=True)
class Workload:
    """One micro-batch, as memory sees it."""

    activations: ActivationBytes
    eval_logits: int
    """Bytes of one evaluation batch's logits."""
    accelerator: str


def estimate_memory(
    shape: ModelShape,
    placement: Placement,
    sizes: ZeroSizes,
    states: StateBytes,
    arithmetic: Arithmetic,
    world_size: int,
    work: Workload,
) -> MemoryPlan:
    """Estimate the peak bytes of one rank."""
    size = arithmetic.element_bytes
    at_loss, at_layer = gathered_bytes(shape, placement, sizes, size)
    unpacked = _dequantized_bytes(shape, size)
    saved = work.activations.saved

    # Loss, backward pass of a layer, and step: each field adds what exceeds the moment before.
    logits = max(work.activations.logits, work.eval_logits - saved)
    buffers = states.buckets.device + at_loss
    backward = work.activations.working + states.backward + at_layer + unpacked
    working_set = max(0, backward - logits - at_loss)
    updating = 0
    if placement.optimizer == "none":
        updating = states.step + arithmetic.optimizer.update_bytes(work.accelerator)
    step = max(0, updating - saved - logits - at_loss - working_set)
    device = DeviceBytes(
        weights=states.weights.device,
        gradients=states.gradients.device,
        optimizer=states.optimizer.device,
        adapters=states.adapters.device,
        activations=saved,
        logits=logits,
        buffers=buffers,
        working_set=working_set,
        step=step,
        runtime=CUDA_RUNTIME_BYTES if work.accelerator == "cuda" else 0,
    )
    host = _host_bytes(shape, placement, states, size, world_size, work.accelerator)
    used = device.total - device.runtime
    if work.accelerator == "cpu":
        used += host.total - host.runtime - host.start
    beginning = _beginning_bytes(shape, placement, states, size, work.accelerator)
    device = replace(device, start=max(0, beginning - used))
    total = states.total
    return MemoryPlan(
        device=device,
        host=host,
        nvme=total.nvme,
        nvme_written_per_step=states.nvme_written_per_step,
        checkpoint=checkpoint_bytes(shape, arithmetic),
    )


def _beginning_bytes(
    shape: ModelShape, placement: Placement, states: StateBytes, size: int, accelerator: str
) -> int:
    """Return the device bytes at the peak of finding adapters' first values; 0 without that."""
    if not shape.start_matrix:
        return 0
    model = states.weights + states.adapters
    if accelerator == "cpu":
        resident = model.device + model.host
    elif placement.zero_stage == 3 or shape.quantized_parameters:
        resident = model.device
    else:
        # DeepSpeed moves the model to the GPU later.
        resident = 0
    gathering = 2 * size * shape.start_matrix if placement.zero_stage == 3 else 0
    return resident + max(gathering, start_bytes(shape, size))


def start_bytes(shape: ModelShape, size: int) -> int:
    """Return the bytes of what is made to find an adapter's first values, of the largest weight.

    Follows ``train/adapters/start.py``: a rank makes a copy of its weight and decomposes it, and
    takes the product out of the base, a block of rows at a time. 16 bits are computed with in fp32.

    Args:
        size: Bytes of an element of the weights.
    """
    converts = size < FP32_BYTES
    in_fp32 = FP32_BYTES * shape.start_matrix if converts else 0
    # Of a weight in 4 bits that of the files is read, beside the one that is dequantized.
    in_files = (size + FP32_BYTES) * shape.start_matrix if shape.quantized_parameters else 0
    decomposing = size * shape.start_matrix + in_fp32 + FP32_BYTES * shape.start_decomposition
    decomposing += in_files
    # The block of the product, that of the base, and the difference; and the factors.
    blocks = (3 if converts else 2) * FP32_BYTES * shape.start_rows
    taking = blocks + (size + 2 * FP32_BYTES) * shape.start_pair + in_files
    return max(decomposing, taking)


def gathered_bytes(
    shape: ModelShape, placement: Placement, sizes: ZeroSizes, size: int
) -> tuple[int, int]:
    """Return the bytes of the weights that stage 3 has gathered at the loss, and inside a layer.

    At the loss these are the head and the last layer; inside a layer, that layer and what is
    prefetched.
    """
    if placement.zero_stage < 3:
        return 0, 0
    layer = shape.layer_bytes(size)
    at_loss = size * shape.head_parameters + layer
    at_layer = layer + 2 * size * sizes.prefetch
    largest = max(
        (tensor.stored_numel(size) for tensor in shape.tensors if not tensor.adapter),
        default=shape.largest_tensor,
    )
    return at_loss, max(at_layer, size * largest)


def _dequantized_bytes(shape: ModelShape, size: int) -> int:
    """Return the bytes of the largest weight in 4 bits while it is used: its numbers and scales."""
    largest = max((tensor.numel for tensor in shape.tensors if tensor.is_quantized), default=0)
    return size * largest + FP32_BYTES * -(-largest // BLOCK_SIZE)


def checkpoint_bytes(shape: ModelShape, arithmetic: Arithmetic) -> int:
    """Bytes of the model or adapter in the training dtype, of master weights and of states."""
    # An adapter's file holds the task's head too, and the first values that the base has lost.
    model = shape.parameters
    if shape.adapter_parameters:
        model = shape.trainable_parameters + shape.start_parameters
    master_and_states = arithmetic.optimizer.master_and_state_bytes * shape.trainable_parameters
    return arithmetic.element_bytes * model + int(master_and_states)


def _host_bytes(
    shape: ModelShape,
    placement: Placement,
    states: StateBytes,
    size: int,
    world_size: int,
    accelerator: str,
) -> HostBytes:
    # torch's allocator of pinned memory rounds a block up to a power of two, where it cannot be
    # told not to.
    round_up = _power_of_two if accelerator == "cuda" and not pins_exactly() else int
    weights = states.weights.host
    if shape.adapter_parameters == 0:
        weights = round_up(weights)
    gradients = round_up(states.gradients.host)
    optimizer = states.optimizer.host + sum(round_up(block) - block for block in states.pinned)

    # Loading reuses the memory that the states take later. On a CPU that includes what is counted
    # as the accelerator's.
    reusable = weights + gradients + optimizer + states.adapters.host + states.buckets.host
    if accelerator == "cpu":
        reusable += states.optimizer.device + states.gradients.device
    loading = _loading_bytes(shape, placement, size, world_size, accelerator)

    save = 0
    if placement.zero_stage == 3:
        # One tensor, gathered in fp32 slices and in the training dtype.
        save = 4 * partition_numel(shape.largest_tensor, world_size) + size * shape.largest_tensor
    return HostBytes(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        adapters=states.adapters.host,
        buffers=states.buckets.host,
        load=max(0, loading - reusable),
        save=save,
        start=size * shape.start_parameters,
        runtime=HOST_RUNTIME_BYTES[accelerator],
    )


def _loading_bytes(
    shape: ModelShape, placement: Placement, size: int, world_size: int, accelerator: str
) -> int:
    """Return the host bytes of the weights while they are read."""
    partitioned = placement.zero_stage == 3
    if accelerator == "cpu":
        # The weights are counted as the accelerator's; stages 1 and 2 hold them a second time while
        # they are flattened.
        return 0 if placement.zero_stage in (0, 3) else shape.weight_bytes(size)
    if partitioned:
        return size * partition_numel(shape.largest_tensor, world_size)
    if shape.adapter_parameters and not shape.quantized_parameters:
        return size * shape.parameters
    # Read straight to the GPU, one tensor at a time.
    return size * shape.largest_tensor


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length() if count > 0 else 0


def find_shortfall(memory: MemoryPlan, hardware: Hardware, ranks_on_node: int) -> str | None:
    """Name each memory that is too small, with what is needed and usable; None where all fits."""
    device = memory.device.total
    host = memory.host.total * ranks_on_node
    if hardware.accelerator == "cpu":
        # Device and host are one memory, which all ranks share.
        needs = [("memory", host + device * ranks_on_node, hardware.host_memory_bytes)]
    else:
        needs = [
            ("GPU memory", device, hardware.device_memory_bytes),
            ("host memory", host, hardware.host_memory_bytes),
        ]
    needs.append(("NVMe", memory.nvme * ranks_on_node, hardware.nvme_bytes))
    problems = [
        f"{name}: needs {format_bytes(needed)} of {format_bytes(USABLE_SHARE * available)}"
        for name, needed, available in needs
        if needed > USABLE_SHARE * available
    ]
    return "; ".join(problems) or None

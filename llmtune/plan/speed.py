"""Predict the duration of an optimizer step, and its bottleneck.

This is a roofline: arithmetic at the card's reachable share of its peak; gathers and reductions
overlap with it, so that the longer of the two counts. Offloaded weights are counted in full,
because DeepSpeed brings a slice from the host or a disk right before the gather that needs it; the
optimizer and what is swapped for it come after the backward pass. An optimizer with a rule for
whole matrices computes with them on the accelerator, one a rank at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmtune.config.schema import Precision
from llmtune.optimizer.optimizer import FP32_BYTES, Optimizer
from llmtune.plan.batch_sizes import BatchPlan
from llmtune.plan.devices.hardware import CPU_LINK_BANDWIDTH, Hardware
from llmtune.plan.memory.parameter_groups import parameter_groups, sub_groups
from llmtune.plan.memory.placement import Placement
from llmtune.plan.memory.rank_bytes import Arithmetic, element_bytes
from llmtune.plan.memory.shapes import ModelShape, TensorShape
from llmtune.plan.memory.zero_buffers import SUB_GROUP

#: Seconds that Python and kernel launches add per layer and pass, without and with ZeRO 3's hooks.
LAUNCH_SECONDS = {"cuda": (0.0003, 0.0010), "cpu": (0.0003, 0.0015)}
#: Bytes of memory that a step touches per parameter, beside the states that it reads and writes: it
#: reads weight and gradient, and writes the weight (fp32) and its copy in the training dtype. On
#: the host four more are counted.
STEP_BYTES, HOST_BYTES = 14, 4
#: A device's bandwidth for it.
DEVICE_BANDWIDTH = {"cuda": 1.5e12, "cpu": 10e9}


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedPlan:
    """The predicted speed, for full rows."""

    step_seconds: float
    tokens_per_second: float
    """Over all ranks."""
    bound_by: str
    """The longest term."""
    terms: dict[str, float]
    """Seconds per step by cause, overlap not subtracted."""


def step_bytes(optimizer: Optimizer) -> int:
    """Count the bytes of a device's memory that an optimizer step touches per parameter."""
    if optimizer.kernel_bytes is not None:
        return optimizer.kernel_bytes
    return STEP_BYTES + 2 * int(optimizer.state_bytes)


def forward_flops(shape: ModelShape, length: int) -> float:
    """Count the operations per token of a forward pass.

    They are two per weight, and those of attention's products; in causal attention a token meets
    half of its row on average.
    """
    attended = length if shape.bidirectional else length / 2
    products = 2.0 * shape.attention_products * attended * shape.attention_width
    return 2.0 * shape.matrix_parameters + products * shape.layers


def step_flops(shape: ModelShape, length: int, recomputed: float) -> float:
    """Count the operations per token of a step.

    They are those of the forward pass, recomputation, and the gradients of inputs and weights.

    Args:
        recomputed: Share of the layers that are computed again, of those that a gradient reaches.
    """
    forward = forward_flops(shape, length)
    head = 0.0 if shape.judges_rows else 2.0 * shape.head_parameters
    reached = shape.reached_layers / shape.layers
    again = recomputed * reached * (forward - head)
    inputs = forward * reached
    weights = 0.0
    if not shape.adapter_parameters:
        weights = forward * shape.trainable_parameters / shape.parameters
    # Adapters of stacks take theirs from the gradient of the whole stack.
    weights += 2.0 * shape.adapted_per_token
    of_layers = shape.adapter_parameters - shape.stack_adapter_parameters
    return forward + inputs + again + weights + 6.0 * of_layers


@dataclass(frozen=True, slots=True)
class Cluster:
    """The machines, and their ranks."""

    hardware: Hardware
    world_size: int

    @property
    def ranks_on_node(self) -> int:
        """Return the number of ranks that share a machine."""
        return max(1, self.world_size // self.hardware.nodes)

    def collective_seconds(self, nbytes: float) -> float:
        """Return the seconds of an all-gather or reduce-scatter of ``nbytes`` over all ranks."""
        if self.world_size == 1:
            return 0.0
        hardware = self.hardware
        link = CPU_LINK_BANDWIDTH if hardware.accelerator == "cpu" else hardware.link_bandwidth
        inside = nbytes * (self.world_size - 1) / self.world_size / link
        across = nbytes * (hardware.nodes - 1) / hardware.nodes / hardware.network_bandwidth
        return max(inside, across)

    def exchange_seconds(self, nbytes: float, count: int) -> float:
        """Return the seconds in which ``count`` neighboring ranks exchange ``nbytes`` each."""
        hardware = self.hardware
        link = CPU_LINK_BANDWIDTH if hardware.accelerator == "cpu" else hardware.link_bandwidth
        if self.ranks_on_node % count:
            # The ranks of a machine share its network.
            link = min(link, hardware.network_bandwidth / self.ranks_on_node)
        return nbytes * (count - 1) / count / link


def matrix_turns(
    shape: ModelShape, placement: Placement, world_size: int
) -> list[list[TensorShape]]:
    """Return the matrices that are updated as a whole, in the turns in which the ranks take them.

    Each rank has one matrix of a turn (:mod:`llmtune.engine.optimizers.matrix_optimizer`). Stage 3
    makes a step of each sub-group, so that no turn has matrices of two.
    """
    groups = parameter_groups(list(shape.tensors), placement, world_size)
    if placement.zero_stage == 3:
        groups = sub_groups(groups, world_size, SUB_GROUP)
    return [
        matrices[first : first + world_size]
        for matrices in ([one for one in group if one.layer_matrix] for group in groups)
        for first in range(0, len(matrices), world_size)
    ]


def estimate_speed(
    shape: ModelShape,
    placement: Placement,
    batch: BatchPlan,
    length: int,
    recomputed: float,
    arithmetic: Arithmetic,
    cluster: Cluster,
) -> SpeedPlan:
    """Predict the seconds of one optimizer step over rows of ``length`` tokens.

    Args:
        recomputed: Share of the layers that are computed again, of those that a gradient reaches.
    """
    hardware, accumulation_steps = cluster.hardware, batch.accumulation_steps
    precision = arithmetic.precision
    tokens = batch.rank_tokens(length)
    ranks = cluster.ranks_on_node if hardware.accelerator == "cpu" else 1
    flops = reachable_flops(hardware, precision)

    # Arithmetic, and the launches of kernels.
    compute = tokens * step_flops(shape, length, recomputed) * ranks / flops
    # Two of all layers, and a third of those that are computed again.
    passes = 2 + recomputed * shape.reached_layers / shape.layers
    compute += (
        passes * shape.layers * LAUNCH_SECONDS[hardware.accelerator][placement.zero_stage == 3]
    )

    # Other work per micro-batch, and once per step.
    gathers = _gather_seconds(shape, placement, passes, precision, cluster)
    weights = _weights_seconds(shape, placement, passes, precision, cluster)
    exchanges = _exchange_seconds(shape, batch, length, passes, precision, cluster)
    terms = {
        "compute": accumulation_steps * compute,
        "gathers": accumulation_steps * gathers,
        "weights from offload": accumulation_steps * weights,
        "tokens for heads": accumulation_steps * exchanges,
        **_step_terms(shape, placement, batch, arithmetic, cluster),
        **_matrix_terms(shape, placement, arithmetic.optimizer, cluster),
    }

    # Gathers overlap with arithmetic; all else is added.
    overlapped = max(terms["compute"], terms["gathers"])
    rest = sum(value for name, value in terms.items() if name not in ("compute", "gathers"))
    seconds = overlapped + rest
    rows = batch.global_batch_size
    return SpeedPlan(
        step_seconds=seconds,
        tokens_per_second=rows * length / seconds,
        bound_by=max(terms, key=lambda name: terms[name]),
        terms=terms,
    )


def average_speed(steps: Sequence[tuple[SpeedPlan, int]]) -> SpeedPlan:
    """Return the mean over steps of several sizes, each with the number of its steps."""
    if len(steps) == 1:
        return steps[0][0]
    count = sum(number for _, number in steps)
    seconds = sum(speed.step_seconds * number for speed, number in steps)
    tokens = sum(speed.tokens_per_second * speed.step_seconds * number for speed, number in steps)
    terms = {
        name: sum(speed.terms[name] * number for speed, number in steps) / count
        for name in steps[0][0].terms
    }
    return SpeedPlan(
        step_seconds=seconds / count,
        tokens_per_second=tokens / seconds,
        bound_by=max(terms, key=lambda name: terms[name]),
        terms=terms,
    )


def reachable_flops(hardware: Hardware, precision: Precision) -> float:
    """Return the operations per second that a training step reaches."""
    if precision is not Precision.fp32:
        return hardware.flops * hardware.efficiency
    # A CPU's vector units have half of bf16's rate; a GPU computes fp32 outside of its tensor
    # cores, unless TF32 is switched on.
    return (hardware.fp32_flops or hardware.flops / 2) * hardware.efficiency


def _gather_seconds(
    shape: ModelShape, placement: Placement, passes: float, precision: Precision, cluster: Cluster
) -> float:
    """Return the seconds of a micro-batch's collectives: weights in both passes, and gradients."""
    size = element_bytes(precision)
    seconds = 0.0
    if placement.zero_stage == 3:
        nbytes = shape.weight_bytes(size)
        # A recomputed layer is still gathered for its backward pass, unless it came from NVMe.
        seconds += (passes if placement.param == "nvme" else 2) * cluster.collective_seconds(nbytes)
    if placement.zero_stage >= 2:
        seconds += cluster.collective_seconds(size * shape.trainable_parameters)
    return seconds


def _exchange_seconds(
    shape: ModelShape,
    batch: BatchPlan,
    length: int,
    passes: float,
    precision: Precision,
    cluster: Cluster,
) -> float:
    """Return the seconds per micro-batch in which ranks that share rows exchange tokens for heads.

    Attention waits for them.
    """
    count = batch.sequence_parallel_size
    if count == 1:
        return 0.0
    numel = sum(shape.exchanged_numel(batch.rank_tokens(length), count))
    nbytes = element_bytes(precision) * numel * passes * shape.layers
    return cluster.exchange_seconds(nbytes, count)


def _weights_seconds(
    shape: ModelShape, placement: Placement, passes: float, precision: Precision, cluster: Cluster
) -> float:
    """Return the seconds per micro-batch to bring offloaded weights to the accelerator."""
    if placement.param == "none":
        return 0.0
    hardware = cluster.hardware
    share = shape.weight_bytes(element_bytes(precision)) / cluster.world_size
    seconds = 2 * share / hardware.pcie_bandwidth
    if placement.param == "nvme":
        seconds = max(
            seconds, passes * share * cluster.ranks_on_node / hardware.nvme_read_bandwidth
        )
    return seconds


def _matrix_terms(
    shape: ModelShape, placement: Placement, optimizer: Optimizer, cluster: Cluster
) -> dict[str, float]:
    """Seconds per step of a rule for whole matrices; empty for an optimizer without one."""
    if (rule := optimizer.matrix) is None:
        return {}
    hardware, ranks = cluster.hardware, 1
    if hardware.accelerator == "cpu":
        ranks = cluster.ranks_on_node
    flops = seconds = 0.0
    for turn in matrix_turns(shape, placement, cluster.world_size):
        # The ranks wait for the one with the largest matrix.
        flops += max(
            math.prod(tensor.shape[:-2]) * rule.flops(*tensor.shape[-2:]) for tensor in turn
        )
        for tensor in turn:
            # Its gradient comes to one rank, unless all have it, and its direction goes to all.
            trips = 1 if placement.zero_stage == 0 else 2
            seconds += trips * cluster.collective_seconds(FP32_BYTES * tensor.numel)
            if placement.optimizer != "none":
                share = tensor.numel / cluster.world_size
                seconds += 2 * FP32_BYTES * share / hardware.pcie_bandwidth
    return {
        # The products are in bf16, whatever the training dtype is.
        "directions of matrices": flops * ranks / reachable_flops(hardware, Precision.bf16),
        "matrices to a rank and back": seconds,
    }


def _step_terms(
    shape: ModelShape,
    placement: Placement,
    batch: BatchPlan,
    arithmetic: Arithmetic,
    cluster: Cluster,
) -> dict[str, float]:
    """Seconds of what is done once per step, after the backward pass."""
    hardware, size = cluster.hardware, arithmetic.element_bytes
    trained, optimizer = shape.trainable_parameters, arithmetic.optimizer
    share = trained / (1 if placement.zero_stage == 0 else cluster.world_size)
    terms: dict[str, float] = {}

    # Collectives of the step.
    if placement.zero_stage == 0:
        terms["gradient reduction"] = 2 * cluster.collective_seconds(size * trained)
    elif placement.zero_stage < 3:
        rounds = 2 if placement.zero_stage == 1 else 1
        terms["weights after the step"] = rounds * cluster.collective_seconds(size * trained)

    # AdamW on the device, or on the host with what goes there and back.
    if placement.optimizer == "none":
        ranks = cluster.ranks_on_node if hardware.accelerator == "cpu" else 1
        touched = step_bytes(optimizer) * share * ranks
        terms["optimizer"] = touched / DEVICE_BANDWIDTH[hardware.accelerator]
        return terms
    on_node = share * cluster.ranks_on_node
    touched = (step_bytes(optimizer) + HOST_BYTES) * on_node
    terms["optimizer on the host"] = touched / hardware.host_memory_bandwidth
    # Each micro-batch's gradients go to the host and, to be added to, back again; at the end
    # gradients in the master weights' dtype go to the host, and weights come back.
    at_the_end = size + optimizer.master_bytes + size
    moved = 2 * size * share * (batch.accumulation_steps - 1) + at_the_end * share
    terms["gradients and weights over PCIe"] = moved / hardware.pcie_bandwidth
    if placement.optimizer == "nvme":
        # Weights, states and gradients.
        swapped = (optimizer.master_and_state_bytes + FP32_BYTES) * on_node
        terms["optimizer states on NVMe"] = (
            swapped / hardware.nvme_read_bandwidth + swapped / hardware.nvme_write_bandwidth
        )
    if placement.param == "nvme" and not shape.adapter_parameters:
        terms["weights to NVMe"] = size * on_node / hardware.nvme_write_bandwidth
    return terms

"""What a rank needs, by category: ZeRO's states exactly, activations roughly.

States follow DeepSpeed 0.19's buffers (``runtime/zero/stage_1_and_2.py``, ``stage3.py``): weights and gradients in the
training dtype, fp32 master weights and two fp32 Adam moments for what is trained.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from llmtune.config.schema import Precision
from llmtune.plan.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Placement:
    """What ZeRO partitions and where it keeps it."""

    zero_stage: int
    offload_optimizer: bool
    offload_param: bool


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one rank, by category."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    host: int
    """Bytes of the rank that live in host memory because of offload."""

    @property
    def states(self) -> int:
        """Weights, gradients, master weights and moments on the accelerator."""
        return self.weights + self.gradients + self.optimizer

    @property
    def device(self) -> int:
        """Bytes on the accelerator."""
        return sum(asdict(self).values()) - self.host


def element_bytes(precision: Precision) -> int:
    """Bytes of one element of weights, activations and gradients."""
    return 4 if precision is Precision.fp32 else 2


def estimate_memory(
    shape: ModelShape,
    placement: Placement,
    precision: Precision,
    world_size: int,
    micro_batch_tokens: int,
    gradient_checkpointing: bool,
) -> MemoryPlan:
    """Peak bytes of one rank.

    Args:
        micro_batch_tokens: Rows of a micro-batch times the longest row.
    """
    size = element_bytes(precision)
    stage, trainable = placement.zero_stage, shape.trainable_parameters
    total = shape.parameters + (trainable if trainable < shape.parameters else 0)
    weights = size * total // (world_size if stage == 3 else 1)
    gradients = size * trainable // (world_size if stage >= 2 else 1)
    # fp32 without ZeRO has no separate master copy.
    state_bytes = 8 if precision is Precision.fp32 and stage == 0 else 12
    optimizer = state_bytes * trainable // (world_size if stage >= 1 else 1)
    # Gathered layers (this one and the next) under ZeRO 3; fp32 gradient of one sub-group at the step otherwise.
    buffers = (
        size * 2 * (shape.layer_parameters + shape.largest_tensor) if stage == 3 else min(4 * trainable, 2 * 10**9)
    )
    host = 0
    if placement.offload_optimizer:
        # DeepSpeed holds an fp32 gradient beside master and moments on the host.
        host += optimizer + 4 * trainable // world_size + gradients
        optimizer = gradients = 0
    if placement.offload_param:
        host += weights
        weights = 0
    return MemoryPlan(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activation_bytes(shape, micro_batch_tokens, size, gradient_checkpointing),
        logits=micro_batch_tokens * shape.vocab_size * (size + 12),
        buffers=buffers,
        host=host,
    )


def activation_bytes(shape: ModelShape, tokens: int, size: int, gradient_checkpointing: bool) -> int:
    """Saved activations: a layer's inner tensors for one layer (checkpointing) or all, plus each layer's input.

    The per-layer sum ``10 hidden + 5 intermediate`` is fitted to the 434 kB a token measured for a Llama-3-70B layer.
    """
    inner = (10 * shape.hidden_size + 5 * shape.intermediate_size) * size * tokens
    inputs = shape.hidden_size * size * tokens * shape.layers
    return inputs + inner if gradient_checkpointing else inner * shape.layers

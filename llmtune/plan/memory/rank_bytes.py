"""Bytes of one rank: its training states, its activations, and the size of an element."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmtune.config.schema import Precision
from llmtune.optimizer.optimizer import Optimizer


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """The training dtype and the optimizer, which no placement changes."""

    precision: Precision
    optimizer: Optimizer

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of weights, activations and gradients."""
        return element_bytes(self.precision)


@dataclass(frozen=True, slots=True)
class Split:
    """Bytes of one rank, by the device that holds them."""

    device: int = 0
    host: int = 0
    nvme: int = 0

    def __add__(self, other: Split) -> Split:
        return Split(self.device + other.device, self.host + other.host, self.nvme + other.nvme)


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBytes:
    """Bytes of one rank between two steps, unless a field says otherwise."""

    weights: Split
    """The base model's weights."""
    adapters: Split
    gradients: Split
    """Gradients from the backward pass to the step."""
    optimizer: Split
    """Master weights and states, and the gradient of their dtype that a host's optimizer keeps."""
    buckets: Split = Split()
    """Reduction buckets and the swapper's buffers."""
    backward: int = 0
    """Device bytes of unpartitioned gradients on their way into a bucket."""
    step: int = 0
    """Device bytes of the gradients that a step makes."""
    nvme_written_per_step: int = 0
    pinned: tuple[int, ...] = ()
    """Blocks of pinned host memory among what the optimizer has there."""

    @property
    def total(self) -> Split:
        """Return all that is held between two steps: the sum of the first five fields."""
        return self.weights + self.adapters + self.gradients + self.optimizer + self.buckets


def element_bytes(precision: Precision) -> int:
    """Return the bytes of one element of weights, activations and gradients."""
    return 4 if precision is Precision.fp32 else 2


def step_gradient_bytes(numel: int, arithmetic: Arithmetic) -> int:
    """Return the bytes of a step's gradients.

    They are flattened in the training dtype, and then converted to the master weights'.
    """
    size, master = arithmetic.element_bytes, arithmetic.optimizer.master_bytes
    flattened = size * numel if size < master else 0
    return flattened + master * numel


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBytes:
    """Bytes of one micro-batch on one rank, without its head and loss."""

    saved: int
    """Held from the forward pass to the backward pass, over all layers."""
    working: int
    """Peak of one layer's backward pass, recomputed or not, beyond ``saved``."""
    origin: str = "traced"
    """``traced``, or ``estimated`` if the architecture could not be run on fake tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationBytes(LayerBytes):
    """Bytes of one micro-batch on one rank."""

    logits: int
    """Peak of head and loss beyond ``saved``, forward and backward."""

    def plus(self, more: LayerBytes) -> ActivationBytes:
        """Add what else is saved, and what is worked with at the same time."""
        return replace(self, saved=self.saved + more.saved, working=self.working + more.working)

"""The sizes of a model and of its tensors, as a plan counts them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorShape:
    """One parameter, in the order in which the model names them."""

    name: str
    numel: int
    trained: bool
    vector: bool
    """One-dimensional, as norms and biases, which have a parameter group of their own."""
    adapter: bool = False
    quantized: bool = False
    """Stored as 4-bit NF4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model's sizes; counts are in elements."""

    parameters: int
    """Elements of the model without adapters; tied weights are counted once."""
    trainable_parameters: int
    adapter_parameters: int
    """0 for full fine-tuning."""
    tied: bool
    head_parameters: int
    """Elements of the output projection, tied or not; 0 if the model has none."""
    matrix_parameters: int
    """Weights that a token is multiplied with: matrices of active experts and other layers, and the
    head, without the input embeddings."""
    largest_tensor: int
    largest_adapter_tensor: int
    layer_parameters: int
    """Elements of the largest layer, adapters included."""
    hidden_size: int
    intermediate_size: int
    layers: int
    vocab_size: int
    attention_width: int
    """Heads times head size, which is attention's cost per pair of positions."""
    causal: bool = True
    """Whether llmtune can train it; other architectures can only be planned."""
    kernels: tuple[str, ...] = ("eager",)
    """Names of its attention kernels in transformers."""
    max_positions: int | None = None
    """Tokens of the longest row that it has positions for; None without a limit."""
    adapted: tuple[str, ...] = ()
    """Last parts of the names of the layers that get adapters."""
    left_alone: tuple[str, ...] = ()
    """Last parts of the names of linear layers that ``all-linear`` does not reach, such as routers;
    see :mod:`llmtune.tuner.adapted_layers`."""
    stacked_parameters: int = 0
    """Elements of experts that are stacked in one tensor, which takes no adapter."""
    kind: str = ""
    """The architecture's ``model_type``."""
    tensors: tuple[TensorShape, ...] = field(default=(), repr=False)
    """Empty in a plan that was read back from a file."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelShape:
        """Build the shape from what JSON made of it."""
        lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists})

    @property
    def quantized_parameters(self) -> int:
        """Elements that are stored in 4 bits."""
        return sum(tensor.numel for tensor in self.tensors if tensor.quantized)

"""The sizes of a model and of its tensors, as a plan counts them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorShape:
    """One parameter, in the order in which the model names them."""

    name: str
    shape: tuple[int, ...]
    """Elements along each dimension; of a partitioned parameter, before it is cut."""
    trained: bool
    adapter: bool = False
    packed_bytes: int = 0
    """Bytes of its 4-bit numbers and of their scales, where it is kept in NF4."""
    layer_matrix: bool = False
    """A matrix of a layer, or a stack of experts' (:mod:`llmtune.tuner.layer_matrices`)."""
    adapted: bool = False
    """An adapter is on it."""
    group: str = ""
    """Key of its settings (:class:`llmtune.optimizer.param_groups.ParamGroup`)."""

    @property
    def numel(self) -> int:
        """Return its number of elements."""
        return math.prod(self.shape)

    @property
    def vector(self) -> bool:
        """Tell whether it is one-dimensional.

        Norms and biases are, and have a parameter group of their own.
        """
        return len(self.shape) <= 1

    @property
    def is_quantized(self) -> bool:
        """Tell whether it is kept in 4 bits."""
        return self.packed_bytes > 0

    def stored_numel(self, element_bytes: int) -> int:
        """Return the elements of the parameter that holds it; ZeRO counts and cuts these.

        Args:
            element_bytes: Bytes of an element of the training dtype.
        """
        return -(-self.packed_bytes // element_bytes) if self.packed_bytes else self.numel


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
    """Elements of the output projection, tied or not, or of the task's head; 0 without one."""
    matrix_parameters: int
    """Weights that a token is multiplied with, without embeddings.

    They are the matrices of active experts and other layers, and the head unless it judges rows.
    """
    largest_tensor: int
    largest_adapter_tensor: int
    layer_parameters: int
    """Elements of the largest layer, adapters included."""
    layer_quantized: int = 0
    """Those of them that are kept in 4 bits."""
    hidden_size: int
    intermediate_size: int
    layers: int
    vocab_size: int
    """Rows of its tables of tokens, before ``tuner.new_tokens`` are added."""
    attention_width: int
    """Heads times head size, which is attention's cost per pair of positions."""
    heads: int = 1
    """Attention heads of queries."""
    key_heads: int = 1
    """Those of keys and values."""
    dynamic_positions: bool = False
    """Rotary positions depend on the length of the row (``dynamic``, ``longrope``)."""
    task: str = "causal_lm"
    """Name of the task whose head the model has."""
    outputs: int = 0
    """Logits of a judged token or row: the vocabulary, classes or values."""
    loss_in_head: bool = False
    """The loss is computed in the output projection, without all its logits at a time.

    See :mod:`llmtune.task.language_head`.
    """
    trains_head: bool = False
    """The weight of the output projection is trained, or the embeddings are that it shares."""
    judges_rows: bool = False
    """A row has one vector of logits, and not one per token."""
    bidirectional: bool = False
    """Tokens attend to later ones, so that padding is masked."""
    attention_products: int = 2
    """Products of attention per pair of positions; DeBERTa has more, of relative positions."""
    trainable: bool = True
    """transformers has the task's class for it; other architectures can only be planned."""
    kernels: tuple[str, ...] = ("eager",)
    """Names of its attention kernels in transformers."""
    max_positions: int | None = None
    """Tokens of the longest row that it has positions for; None without a limit."""
    scalable: bool = False
    """Its positions are rotary, and ``model.rope_scaling`` can multiply them."""
    frozen_layers: int = 0
    """Layers before everything that is trained: no gradient flows back through them."""
    recomputing: str = "one by one"
    """Kind of recomputation that its layers allow.

    See :func:`llmtune.plan.abilities.find_recomputing`.
    """
    adapted: tuple[str, ...] = ()
    """Last parts of the names of the layers that get adapters."""
    left_alone: tuple[str, ...] = ()
    """Last parts of the names of linear layers that ``all-linear`` does not reach, such as routers.

    See :mod:`llmtune.tuner.adapted_layers`.
    """
    stacked_parameters: int = 0
    """Elements of stacked experts without an adapter."""
    unreached_stacks: tuple[str, ...] = ()
    """Their names within a layer, as ``tuner.target_parameters`` takes them."""
    stack_adapter_parameters: int = 0
    """Elements of the adapters on stacked experts."""
    adapted_stacks: int = 0
    """Elements of the stacked experts with an adapter."""
    adapted_per_token: int = 0
    """Those of them that a token is multiplied with."""
    start_parameters: int = 0
    """Elements of the first values of adapters that the base loses; 0 with another start.

    See :mod:`llmtune.tuner.start_factors`.
    """
    start_matrix: int = 0
    """Elements of the largest weight of which they are a part."""
    start_pair: int = 0
    """Elements of the largest pair of an adapter's first values."""
    start_rows: int = 0
    """Elements of the largest block of rows that they are taken out of at once."""
    start_decomposition: int = 0
    """Most fp32 elements that a decomposition holds beside the weight in fp32."""
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
    def largest_gradient(self) -> int:
        """Return the elements of the largest trained tensor; 0 of a shape without its tensors."""
        return max((tensor.numel for tensor in self.tensors if tensor.trained), default=0)

    @property
    def reached_layers(self) -> int:
        """Return the number of layers that a gradient flows back through."""
        return max(0, self.layers - self.frozen_layers)

    @property
    def quantized_parameters(self) -> int:
        """Return the number of elements that are stored in 4 bits."""
        return sum(tensor.numel for tensor in self.tensors if tensor.is_quantized)

    def exchanged_numel(self, tokens: int, count: int) -> tuple[int, int]:
        """Return the elements that a rank exchanges for a layer, before and behind attention.

        Before it these are queries, keys and values, behind it the result for each query; heads of
        keys are repeated where they do not divide among the ranks (``engine/head_exchange.py``).

        Args:
            tokens: Of one rank.
            count: Ranks that share a row.
        """
        width = self.attention_width // self.heads
        keys = math.lcm(self.key_heads, count)
        return tokens * width * (self.heads + 2 * keys), tokens * self.attention_width

    def weight_bytes(self, element_bytes: int) -> int:
        """Return the bytes of the model's weights as they are kept, without adapters."""
        packed = sum(
            element_bytes * tensor.stored_numel(element_bytes)
            for tensor in self.tensors
            if tensor.is_quantized
        )
        return element_bytes * (self.parameters - self.quantized_parameters) + packed

    def layer_bytes(self, element_bytes: int) -> int:
        """Return the bytes of the largest layer as it is kept, adapters included."""
        packed = sum(tensor.packed_bytes for tensor in self.tensors)
        share = packed / max(1, self.quantized_parameters)
        plain = self.layer_parameters - self.layer_quantized
        return element_bytes * plain + round(share * self.layer_quantized)

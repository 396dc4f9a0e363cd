"""List and count a model's parameters, those of its adapters and of its head."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtune.config.groups.tuner import TunerConfig
from llmtune.errors import ConfigError
from llmtune.plan.memory.shapes import TensorShape
from llmtune.tuner.adapted_layers import AdaptedLayers, matrix_sides
from llmtune.tuner.blocks import count_elements, find_blocks
from llmtune.tuner.head import in_modules
from llmtune.tuner.layer_matrices import find_layer_matrices
from llmtune.tuner.lora_settings import (
    TAKEN_ROWS,
    begins_from_base,
    changes_base,
    check_patterns,
    iterations,
    lora_rank,
)
from llmtune.tuner.nf4_layout import Nf4Layout
from llmtune.tuner.quantized_layers import find_quantized_layers
from llmtune.tuner.stacks.stacked_weights import Stack
from llmtune.tuner.token_rows.settings import TokenTable
from llmtune.tuner.tuner import TUNERS


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSizes:
    """The sizes of an adapter on a layer, or on a stack of experts."""

    rank: int
    """The sum of all experts' ranks, for a stack."""
    inputs: int
    outputs: int
    lengths: int = 0
    """DoRA's, one for each output; 0 without DoRA."""
    is_of_stack: bool = False
    """It is that of all experts of a stack, and no pair of matrices by itself."""

    @property
    def matrices(self) -> int:
        """Return the elements of its two matrices."""
        return self.rank * (self.inputs + self.outputs)

    @property
    def total(self) -> int:
        """Return the elements of the whole adapter."""
        return self.matrices + self.lengths


def list_tensors(
    model: Any,
    adapters: dict[str, AdapterSizes],
    trained: Collection[str],
    packed: Mapping[str, int],
    head: Sequence[str] = (),
    stacks: Mapping[str, Stack] | None = None,
    token_tables: Sequence[TokenTable] = (),
) -> list[TensorShape]:
    """List the parameters in the order of peft's model.

    An adapted layer's own weight comes first, then ``lora_A``, ``lora_B`` and DoRA's lengths. Rows
    of single tokens come behind the weight of their table, and the adapters of a module's stacks
    behind all of its parameters.

    Args:
        adapters: Sizes of the adapter of each adapted layer and stack.
        trained: Names of the model's own parameters that are trained.
        packed: Name of a weight that is kept in 4 bits -> its bytes.
        head: Names of the modules that are the task's head.
        stacks: The stacks of experts with adapters, by name.
        token_tables: Tables of which single rows are trained.
    """
    tensors: list[TensorShape] = []
    tables = {table.path: table for table in token_tables}
    matrices = find_layer_matrices(model)
    stacks = stacks or {}
    behind = _adapters_behind(model, stacks)
    for name, parameter in model.named_parameters():
        owner = name.removesuffix(".weight")
        is_layer = name.endswith(".weight") and owner in adapters and name not in stacks
        tensors.append(
            TensorShape(
                name=name,
                shape=tuple(parameter.shape),
                trained=name in trained,
                packed_bytes=packed.get(name, 0),
                layer_matrix=name in matrices and not in_modules(name, head),
                adapted=is_layer or name in stacks,
            )
        )
        for path in [owner] if is_layer else behind.get(name, []):
            tensors += _matrices(path, adapters[path])
        if name.endswith(".weight") and owner in tables:
            tensors.append(_token_rows(tables[owner]))
    # A tied head, whose weight has the name of the embedding.
    seen = {tensor.name.partition(".lora_")[0] for tensor in tensors if tensor.adapter}
    for owner in adapters.keys() - seen:
        tensors += _matrices(owner, adapters[owner])
    return tensors


def _adapters_behind(model: Any, stacks: Mapping[str, Stack]) -> dict[str, list[str]]:
    """Map the last parameter of each module with stacks to its adapters, the innermost first."""
    of_module: dict[str, list[str]] = {}
    for stack in stacks.values():
        of_module.setdefault(stack.owner, []).append(stack.adapter)
    return {
        f"{owner}.{list(model.get_submodule(owner).named_parameters())[-1][0]}": adapters
        for owner, adapters in of_module.items()
    }


def _matrices(owner: str, sizes: AdapterSizes) -> list[TensorShape]:
    parts = [("A", (sizes.rank, sizes.inputs)), ("B", (sizes.outputs, sizes.rank))]
    tensors = [
        TensorShape(
            name=f"{owner}.lora_{matrix}.default.weight",
            shape=shape,
            trained=True,
            adapter=True,
            layer_matrix=not sizes.is_of_stack,
        )
        for matrix, shape in parts
    ]
    if sizes.lengths:
        tensors.append(
            TensorShape(
                name=f"{owner}.lora_magnitude_vector.default.weight",
                shape=(sizes.lengths,),
                trained=True,
                adapter=True,
            )
        )
    return tensors


def _token_rows(table: TokenTable) -> TensorShape:
    shape = (len(table.tokens), table.width)
    return TensorShape(name=table.parameter, shape=shape, trained=True, adapter=True)


def is_tied(model: Any) -> bool:
    """Tell whether the output projection is the input embedding."""
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and inputs is not None and head.weight is inputs.weight


def head_parameters(model: Any, head: Sequence[str]) -> int:
    """Count the elements of the task's head, or of the output projection."""
    if head:
        modules = [model.get_submodule(name) for name in head]
        return sum(parameter.numel() for module in modules for parameter in module.parameters())
    output = model.get_output_embeddings()
    return output.weight.numel() if output is not None else 0


def matrix_parameters(model: Any, text: Any, of_rows: Sequence[str] = ()) -> int:
    """Count the weights in a token's forward pass; of experts only the share that is used.

    Args:
        text: The model's text configuration.
        of_rows: Names of the modules that see a row once, and not each of its tokens.
    """
    from torch import nn

    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    share = active_share(text)
    total = 0.0
    output = model.get_output_embeddings()
    if output is not None and id(output.weight) in embeddings:
        total = float(output.weight.numel())
    for name, parameter in model.named_parameters():
        if (
            parameter.dim() > 1
            and id(parameter) not in embeddings
            and not in_modules(name, of_rows)
        ):
            total += parameter.numel() * (share if ".experts." in name else 1.0)
    return round(total)


def active_share(text: Any) -> float:
    """Return the share of the experts that a token is sent to; 1 for a dense model.

    Args:
        text: The model's text configuration.
    """
    experts = int(
        getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 0
    )
    if not experts:
        return 1.0
    return int(getattr(text, "num_experts_per_tok", None) or experts) / experts


def largest_layer(
    model: Any, adapters: dict[str, AdapterSizes], tensors: Sequence[TensorShape]
) -> tuple[int, int]:
    """Count the parameters of the largest block of the module list that holds most.

    Returns:
        All of them, and those that are kept in 4 bits.
    """
    quantized = {tensor.name: tensor.numel for tensor in tensors if tensor.is_quantized}
    blocks = find_blocks(model)
    if blocks is None:
        return count_elements(model), sum(quantized.values())
    sizes = []
    for index, block in enumerate(blocks.modules):
        size, start = count_elements(block), f"{blocks.path(index)}."
        for owner, sizes_of_owner in adapters.items():
            if owner.startswith(start):
                size += sizes_of_owner.total
        in_4_bits = sum(numel for name, numel in quantized.items() if name.startswith(start))
        sizes.append((size, in_4_bits))
    return max(sizes)


def packed_sizes(model: Any, tuner: TunerConfig, head: Sequence[str]) -> dict[str, int]:
    """Map each weight that the tuner keeps in 4 bits to its bytes, scales included.

    Args:
        head: Names of the modules that are the task's head.
    """
    if not TUNERS.find(tuner.kind).is_quantized:
        return {}
    return {
        f"{name}.weight": Nf4Layout(layer.weight.numel(), tuner.bnb_4bit_use_double_quant).nbytes
        for name, layer in find_quantized_layers(model, head).items()
    }


def check_packed(packed: Mapping[str, int], trained: Collection[str], tuner: TunerConfig) -> None:
    """Refuse to train weights that are kept in 4 bits.

    Args:
        packed: From :func:`packed_sizes`.
        trained: Names of the model's own parameters that are trained.

    Raises:
        ConfigError: ``tuner.modules_to_save`` names such a weight.
    """
    if both := [name for name in packed if name in trained]:
        raise ConfigError(
            f"tuner.modules_to_save={tuner.modules_to_save} with tuner={tuner.kind}: {both[0]} is"
            " kept in 4 bits, which no optimizer can train; leave it out, where it has an adapter,"
            " or take tuner=lora"
        )


def adapter_sizes(adapted: AdaptedLayers, tuner: TunerConfig) -> dict[str, AdapterSizes]:
    """Map the path of each adapter to its sizes."""
    check_patterns(tuner, [*adapted.layers, *adapted.stacks])
    found = {}
    for name, stack in adapted.stacks.items():
        rank = stack.experts * lora_rank(tuner, name)
        found[stack.adapter] = AdapterSizes(
            rank=rank, inputs=stack.inputs, outputs=stack.outputs, is_of_stack=True
        )
    for name, layer in adapted.layers.items():
        inputs, outputs = matrix_sides(layer)
        rank = lora_rank(tuner, name)
        if begins_from_base(tuner) and rank > min(inputs, outputs):
            raise ConfigError(
                f"tuner.init_lora_weights={tuner.init_lora_weights} takes {rank} directions of"
                f" {name}, which has {min(inputs, outputs)}; lower tuner.lora_r, or give it a rank"
                " of its own with tuner.rank_pattern"
            )
        lengths = outputs if tuner.use_dora else 0
        found[name] = AdapterSizes(rank=rank, inputs=inputs, outputs=outputs, lengths=lengths)
    return found


def count_start(adapters: Mapping[str, AdapterSizes], tuner: TunerConfig) -> dict[str, Any]:
    """Count what adapters need that begin with a part of the base's weights (PiSSA, OLoRA, LoftQ).

    Returns:
        The fields of :class:`ModelShape` whose names begin with ``start``, in elements.
    """
    if not begins_from_base(tuner):
        return {}
    layers = adapters.values()
    start = tuner.init_lora_weights
    # LoftQ's base loses nothing, so that its first values are not kept.
    return {
        "start_parameters": sum(sizes.matrices for sizes in layers) if changes_base(tuner) else 0,
        "start_matrix": max(sizes.outputs * sizes.inputs for sizes in layers),
        "start_pair": max(sizes.matrices for sizes in layers),
        "start_rows": max(min(sizes.outputs, TAKEN_ROWS) * sizes.inputs for sizes in layers),
        "start_decomposition": max(decomposition_numel(sizes, start) for sizes in layers),
    }


def decomposition_numel(sizes: AdapterSizes, start: str) -> int:
    """Bound the fp32 elements that the decomposition of a layer's weight holds at its peak.

    They come on top of the weight in fp32 (:func:`llmtune.tuner.start_factors.decompose`). The
    counts are those of LAPACK on a CPU, where ``tests/plan/test_peak_memory.py`` measures them.
    With ``k`` the shorter side of the weight:

    * SVD (``gesdd``): a copy of the weight, both bases (its size, and ``k * k``), and four times
      ``k * k`` to work in.
    * QR: a copy of the weight that becomes one factor, the other one (``k * k``), and blocks of 64.
    * Randomized SVD: two bases of rank ``r`` on either side, and the factors in 16 bits.

    Args:
        start: ``tuner.init_lora_weights``.
    """
    rows, columns = sizes.outputs, sizes.inputs
    whole, square = rows * columns, min(rows, columns) ** 2
    if start == "olora":
        return whole + square + 64 * (rows + columns)
    if iterations(start) is not None:
        return 5 * sizes.rank * (rows + columns) // 2
    return 2 * whole + 5 * square

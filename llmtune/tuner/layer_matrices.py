"""Find the matrices of a model's layers, which some optimizers update as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def find_layer_matrices(model: Any) -> set[str]:
    """Name the parameters that multiply hidden states: matrices, and stacks of experts' matrices.

    Tables of embeddings and the output projection are left out, and so are adapters of tables and
    trained rows of them. Adapters of stacked experts are left out too: one parameter holds those of
    all experts side by side.
    The head of a task is not known here.

    Args:
        model: A transformers model, on any device, under ZeRO 3 with slices of its parameters; or
            peft's model around one.
    """
    from torch import nn

    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    output = model.get_output_embeddings()
    others = {
        id(parameter)
        for module in (
            *tables,
            *([output] if output is not None else []),
            *_adapters_of_stacks(model),
        )
        for parameter in module.parameters()
    }
    of_tables = (".lora_embedding_", ".trainable_tokens_")
    found = set()
    for name, parameter in model.named_parameters():
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        is_matrix = dimensions == 2 or (dimensions == 3 and ".experts." in name)
        is_of_table = id(parameter) in others or any(infix in name for infix in of_tables)
        if is_matrix and not is_of_table:
            found.add(name)
    return found


def _adapters_of_stacks(model: Any) -> Iterator[Any]:
    """Yield the modules with the matrices of peft's ``ParamWrapper``, which adapts a parameter."""
    for module in model.modules():
        if hasattr(module, "parameter_name") and hasattr(module, "lora_A"):
            yield from (module.lora_A, module.lora_B)

"""Make a model with its linear layers in NF4, of which no more is allocated than a rank keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from llmtune.model.nf4.nf4_linear import Nf4Linear, Nf4Origin
from llmtune.model.nf4.nf4_slices import Nf4Weight
from llmtune.model.weights.partition_edit import is_partitioned
from llmtune.model.weights.zero3_loading import PackedWeight, Read, ReadAgain
from llmtune.tuner.adapted_layers import matrix_sides
from llmtune.tuner.quantized_layers import find_quantized_layers


@dataclass(frozen=True, slots=True)
class In4Bits:
    """The settings with which a model's weights are quantized while they are read."""

    double_quant: bool
    """The scales are quantized too."""
    device: torch.device
    """The device on which they are quantized, and on which unpartitioned weights stay."""
    gather: Callable[[torch.Tensor], torch.Tensor]
    """Joins the tensors of all ranks on every rank, on the host, where ZeRO 3 partitions them."""


def quantize_layers(
    model: Any, head: Sequence[str], settings: In4Bits, dtype: torch.dtype
) -> list[str]:
    """Replace the layers that are kept in 4 bits. Parameters are made, and have no values yet.

    Args:
        model: A transformers model on the meta device.
        head: Names of the modules that are the task's head.
        dtype: The training's.

    Returns:
        The paths of the layers.
    """
    layers = find_quantized_layers(model, head)
    for path, layer in layers.items():
        inputs, outputs = matrix_sides(layer)
        quantized = Nf4Linear(
            inputs,
            outputs,
            layer.bias is not None,
            double_quant=settings.double_quant,
            transposed=not isinstance(layer, nn.Linear),
            dtype=dtype,
        )
        model.set_submodule(path, quantized)
    return list(layers)


class _Memory(nn.Module):
    """Parameters without values, as large as others.

    Made inside DeepSpeed's ``zero.Init``, they are this rank's slices of them.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]):
        super().__init__()
        for name, parameter in parameters.items():
            memory = torch.empty(parameter.shape, dtype=parameter.dtype)
            self.register_parameter(
                name, nn.Parameter(memory, requires_grad=parameter.requires_grad)
            )


def allocate(model: Any, device: torch.device) -> None:
    """Give every parameter on the meta device memory, one module after the other.

    Args:
        device: Where the buffers go. Parameters go where ``torch.empty`` makes tensors.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        parameters = {
            name: parameter
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.is_meta
        }
        # A tied parameter is made once.
        new = {name: one for name, one in parameters.items() if id(one) not in made}
        memory = dict(_Memory(new).named_parameters())
        made |= {id(parameter): memory[name] for name, parameter in new.items()}
        for name, parameter in parameters.items():
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def packed_weights(
    model: Any, layers: Iterable[str], settings: In4Bits, dtype: torch.dtype
) -> dict[str, PackedWeight]:
    """Say for each quantized parameter how it is made of the weight in the files.

    Args:
        layers: Paths of the layers in 4 bits.
        dtype: The training's, from which the weights are quantized.
    """

    def pack(layer: Nf4Linear, read: Read) -> Read:
        return Nf4Weight(
            layout=layer.matrix.layout,
            read=read,
            dtype=dtype,
            device=settings.device,
            gather=settings.gather if is_partitioned(layer.weight) else None,
        ).read_stored

    def remember(layer: Nf4Linear, read_again: ReadAgain) -> None:
        layer.origin = Nf4Origin(read_again, partial(pack, layer))

    packed = {}
    for path in layers:
        layer = model.get_submodule(path)
        packed[f"{path}.weight"] = PackedWeight(
            stored_shape=layer.stored_shape,
            transposed=layer.is_stored_transposed,
            pack=partial(pack, layer),
            remember=partial(remember, layer),
        )
    return packed

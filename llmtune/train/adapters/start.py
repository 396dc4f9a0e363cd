"""Begin adapters with a part of the base's weights (PiSSA, OLoRA, LoftQ), one weight at a time.

Each rank decomposes every n-th weight and sends the others its factors, which are small. Then each
takes their product out of what it holds of the base, but for LoftQ, whose base stays. Under ZeRO 3
a weight is gathered alone, so that no rank ever holds more than one.

Of a base in 4 bits the weights are read from the model's files again: PiSSA and OLoRA decompose
them, and quantize what is left; LoftQ (https://arxiv.org/abs/2310.08659) decomposes what the
quantization lost. That is the first of its iterations, after which the base is the one that
bitsandbytes makes of the model, so that the adapter fits it wherever it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llmtune.draws import Draw, torch_seed
from llmtune.engine.distributed import Rank, broadcast_tensor
from llmtune.engine.partitions import gather
from llmtune.model.nf4.nf4_linear import Nf4Linear
from llmtune.model.weights.partition_edit import change_own
from llmtune.tuner.lora_settings import LOFTQ
from llmtune.tuner.start_factors import Factors, adapted_layers, decompose, taken_pieces
from llmtune.tuner.stored_adapter import ADAPTER_NAME
from llmtune.tuner.whole_parameters import whole_shape


def begin_from_base(model: Any, start: str, seed: int, rank: Rank) -> dict[str, Factors]:
    """Fill adapters with the part of the base's weights that they begin with. Collective.

    Args:
        model: A model with peft's adapters.
        start: ``tuner.init_lora_weights``.

    Returns:
        The first values by the layers' names.
    """
    begun: dict[str, Factors] = {}
    layers = list(adapted_layers(model))
    for first in range(0, len(layers), rank.world_size):
        turn = layers[first : first + rank.world_size]
        own = _own_factors(turn, start, seed, first, rank)
        for owner, (name, layer) in enumerate(turn):
            factors = own if owner == rank.rank and own is not None else _empty(layer, rank)
            broadcast_tensor(factors.a, owner, rank)
            broadcast_tensor(factors.b, owner, rank)
            begun[name] = factors.to("cpu")
            with torch.no_grad():
                layer.lora_A[ADAPTER_NAME].weight.copy_(factors.a)
                layer.lora_B[ADAPTER_NAME].weight.copy_(factors.b)
            if start != LOFTQ:
                _take(layer, factors, rank)
            _measure_lengths(layer)
        rank.phases.beat()
    return begun


def take_from_base(model: Any, start: Mapping[str, Factors], rank: Rank) -> None:
    """Take the first values of stored adapters out of the base, as when they were begun."""
    layers = dict(adapted_layers(model))
    for name, factors in start.items():
        _take(layers[name], factors.to(rank.device), rank)


def _own_factors(
    turn: list[tuple[str, Any]], start: str, seed: int, first: int, rank: Rank
) -> Factors | None:
    """Decompose this rank's weight of a turn; None where the turn has none for it."""
    weight: torch.Tensor | None = None
    for owner, (_, layer) in enumerate(turn):
        with gather([layer.get_base_layer().weight]):
            if owner == rank.rank:
                weight = _copy_weight(layer, start, rank.device)
    if weight is None:
        return None
    layer = turn[rank.rank][1]
    # The same numbers whatever rank draws them.
    torch.manual_seed(torch_seed(seed, Draw.adapter, first + rank.rank))
    dtype = layer.lora_A[ADAPTER_NAME].weight.dtype
    return decompose(weight, layer.r[ADAPTER_NAME], layer.scaling[ADAPTER_NAME], start, dtype)


def _copy_weight(layer: Any, start: str, device: torch.device) -> torch.Tensor:
    """Return what is decomposed of a layer, whose weight is whole. Shape (outputs, inputs)."""
    base = layer.get_base_layer()
    if not isinstance(base, Nf4Linear):
        weight: torch.Tensor = base.weight.detach()
        return (weight.T if layer.fan_in_fan_out else weight).to(device, copy=True)
    original = base.origin.read_weight().to(device, base.weight.dtype)
    if start != LOFTQ:
        return original
    return original.float() - base.dequantize().to(device, torch.float32)


def _empty(layer: Any, rank: Rank) -> Factors:
    matrices = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
    a, b = (torch.empty(whole_shape(one), dtype=one.dtype, device=rank.device) for one in matrices)
    return Factors(a, b)


def _take(layer: Any, factors: Factors, rank: Rank) -> None:
    """Take ``s * B0 @ A0`` out of what this rank holds of a layer's weight."""
    base = layer.get_base_layer()
    if isinstance(base, Nf4Linear):
        _quantize_rest(base, factors, layer.scaling[ADAPTER_NAME], rank)
        return
    if layer.fan_in_fan_out:
        # The weight is stored as (in, out).
        factors = Factors(factors.b.T, factors.a.T)
    scale = layer.scaling[ADAPTER_NAME]

    def subtract(values: torch.Tensor, start: int) -> None:
        for at, piece in taken_pieces(factors, scale, start, values.numel()):
            target = values[at : at + piece.numel()]
            target.copy_(target.float() - piece.to(target.device))

    change_own(base.weight, subtract, rank.rank)


def _measure_lengths(layer: Any) -> None:
    """Give DoRA the lengths of a base in 4 bits together with its adapter. Collective under ZeRO 3.

    peft measured them before. Of another base they stay, since an adapter that takes its values
    from the base leaves the sum as it was.
    """
    base = layer.get_base_layer()
    if not isinstance(base, Nf4Linear) or ADAPTER_NAME not in layer.lora_magnitude_vector:
        return
    lengths = layer.lora_magnitude_vector[ADAPTER_NAME]
    product = layer.lora_B[ADAPTER_NAME].weight @ layer.lora_A[ADAPTER_NAME].weight
    with gather([base.weight]), torch.no_grad():
        weight = base.dequantize().to(product.device)
        scale = layer.scaling[ADAPTER_NAME]
        lengths.weight.copy_(lengths.get_weight_norm(weight, product, scaling=scale))


def _quantize_rest(base: Nf4Linear, factors: Factors, scale: float, rank: Rank) -> None:
    """Hold in 4 bits what is left of a weight without ``s * B0 @ A0``. Collective under ZeRO 3."""
    rest = base.origin.read_weight().to(base.weight.dtype).contiguous()
    flat = rest.view(-1)
    for at, piece in taken_pieces(factors, scale, 0, flat.numel()):
        target = flat[at : at + piece.numel()]
        target.copy_(target.float() - piece.to(target.device))
    base.quantize(rest, rank.rank)

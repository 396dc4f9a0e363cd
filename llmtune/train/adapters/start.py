"""Move a part of the base's weights into adapters (PiSSA, OLoRA), one weight at a time.

Each rank decomposes every n-th weight and sends the others its factors, which are small. Then each
takes their product out of what it holds of the base. Under ZeRO 3 a weight is gathered alone, so
that no rank ever holds more than one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llmtune.draws import Draw, torch_seed
from llmtune.engine.distributed import Rank, broadcast_tensor
from llmtune.engine.partitions import gather
from llmtune.model.weights.partition_edit import change_own
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
            _take(layer, factors, rank)
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
        base = layer.get_base_layer().weight
        with gather([base]):
            if owner == rank.rank:
                whole = base.detach().T if layer.fan_in_fan_out else base.detach()
                weight = whole.to(rank.device, copy=True)
    if weight is None:
        return None
    layer = turn[rank.rank][1]
    # The same numbers whatever rank draws them.
    torch.manual_seed(torch_seed(seed, Draw.adapter, first + rank.rank))
    return decompose(weight, layer.r[ADAPTER_NAME], layer.scaling[ADAPTER_NAME], start)


def _empty(layer: Any, rank: Rank) -> Factors:
    matrices = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
    a, b = (torch.empty(whole_shape(one), dtype=one.dtype, device=rank.device) for one in matrices)
    return Factors(a, b)


def _take(layer: Any, factors: Factors, rank: Rank) -> None:
    """Take ``s * B0 @ A0`` out of what this rank holds of a layer's weight."""
    if layer.fan_in_fan_out:
        # The weight is stored as (in, out).
        factors = Factors(factors.b.T, factors.a.T)
    scale = layer.scaling[ADAPTER_NAME]

    def subtract(values: torch.Tensor, start: int) -> None:
        for at, piece in taken_pieces(factors, scale, start, values.numel()):
            target = values[at : at + piece.numel()]
            target.copy_(target.float() - piece.to(target.device))

    change_own(layer.get_base_layer().weight, subtract, rank.rank)

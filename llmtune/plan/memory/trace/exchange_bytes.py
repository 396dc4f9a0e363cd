"""Bytes of the exchange of tokens for heads among the ranks that share the tokens of a row."""

from __future__ import annotations

import math

from llmtune.plan.memory.rank_bytes import LayerBytes
from llmtune.plan.memory.shapes import ModelShape


def sent_numel(shape: ModelShape, tokens: int, count: int) -> tuple[int, int]:
    """Return the elements that a rank exchanges for a layer, before and behind attention.

    Before it these are queries, keys and values, behind it the result for each query; heads of keys
    are repeated where they do not divide among the ranks (``engine/head_exchange.py``).

    Args:
        tokens: Of one rank.
        count: Ranks that share a row.
    """
    width = shape.attention_width // shape.heads
    repeated = math.lcm(shape.key_heads, count)
    return tokens * width * (shape.heads + 2 * repeated), tokens * shape.attention_width


def exchange_bytes(
    shape: ModelShape, tokens: int, count: int, element_bytes: int, recompute: bool
) -> LayerBytes:
    """Return what the exchange adds to the activations of one rank.

    What goes out, what comes in and its copy in the order of tokens are there at the same time. Of
    attention's result both sides are kept, where a layer is not recomputed: one by the kernel, the
    other by the projection behind it.

    Args:
        tokens: Of one rank.
        count: Ranks that share a row; 1 exchanges nothing.
    """
    if count == 1:
        return LayerBytes(saved=0, working=0)
    before, behind = sent_numel(shape, tokens, count)
    both_sides = element_bytes * behind
    working = 3 * element_bytes * before
    if recompute:
        return LayerBytes(saved=0, working=working + both_sides)
    layers = shape.layers - shape.frozen_layers
    return LayerBytes(saved=both_sides * layers, working=working)

"""Bytes of the exchange of tokens for heads among the ranks that share the tokens of a row."""

from __future__ import annotations

from llmtune.plan.memory.rank_bytes import LayerBytes
from llmtune.plan.memory.recomputed_layers import RecomputedLayers
from llmtune.plan.memory.shapes import ModelShape


def exchange_bytes(
    shape: ModelShape, tokens: int, count: int, element_bytes: int, recomputed: RecomputedLayers
) -> LayerBytes:
    """Return what the exchange adds to the activations of one rank.

    What goes out, what comes in and its copy in the order of tokens are there at the same time. Of
    attention's result both sides are kept, where a layer is not recomputed: one by the kernel, the
    other by the projection behind it. The kernel also keeps the keys and values that were repeated.

    Args:
        tokens: Of one rank.
        count: Ranks that share a row; 1 exchanges nothing.
    """
    if count == 1:
        return LayerBytes(saved=0, working=0)
    before, behind = shape.exchanged_numel(tokens, count)
    once, _ = shape.exchanged_numel(tokens, 1)
    more = element_bytes * (behind + before - once)
    working = 3 * element_bytes * before
    kept = recomputed.total - recomputed.count
    if recomputed.count and kept == 0:
        return LayerBytes(saved=0, working=working + more)
    # Layers that keep both are freed before one is computed again.
    return LayerBytes(saved=more * kept, working=working)

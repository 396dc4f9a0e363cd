"""Let layers of a model compute their activations again in the backward pass."""

from __future__ import annotations

from typing import Any

from llmtune.plan.abilities import ONE_BY_ONE, find_recomputing
from llmtune.plan.memory.recomputed_layers import RecomputedLayers
from llmtune.tuner.blocks import find_blocks


def recompute_layers(model: Any, layers: RecomputedLayers) -> None:
    """Switch recomputation on for the first layers that a gradient reaches.

    The last layers keep their activations, because theirs are the first that the backward pass
    frees: they are gone when a layer is computed again. Layers before everything that is trained
    keep nothing in any case.

    Call it after adapters were added. peft would make the first layer's input need a gradient, and
    so would transformers' ``enable_input_require_grads``; checkpoints that are not reentrant do
    without, and layers that are frozen as a whole then stay out of the backward pass.

    Args:
        model: A transformers model with or without adapters, also partitioned by ZeRO 3. Modules
            beside its stack of layers, such as an encoder of images, are recomputed too where any
            layer is.
    """
    if layers.count == 0:
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    blocks = find_blocks(base)
    if blocks is None or find_recomputing(base) != ONE_BY_ONE:
        return
    first = len(blocks.modules) - layers.total
    for index, block in enumerate(blocks.modules):
        block.gradient_checkpointing = first <= index < first + layers.count

"""Adapters on stacked experts (``target_parameters``), in whatever form the base stores these.

A model has the experts of a layer in one parameter. Files have them so too, or one by one, and gate
and up projection apart: transformers stacks them as it loads. Each stored tensor is then a slice of
the stack, and gets its slice of the adapter.
"""

from __future__ import annotations

from typing import Any

from llmtune.errors import ExportError
from llmtune.export.merge.adapter import Adapter
from llmtune.export.merge.deltas import ExpertDelta, StackDelta, StackPart
from llmtune.model.weights.names import Conversion, match_names
from llmtune.storage.tensors.tensor_spec import TensorSpec
from llmtune.tuner.stacks.stacked_weights import Stack, describe_stacks, find_stacks, is_target
from llmtune.units import some


def find_stack_deltas(
    skeleton: Any, stored: dict[str, TensorSpec], adapter: Adapter
) -> dict[str, StackPart]:
    """Find what an adapter does to the stored tensors of stacked experts, by their names.

    Args:
        skeleton: The base without weights.
        stored: The base's tensors.

    Raises:
        ExportError: The adapter is another model's, or on parameters that are no stacks; or
            transformers computes the stacks in a way that is not known here.
    """
    targets = [str(name) for name in adapter.settings.get("target_parameters") or ()]
    named = [name for name, _ in skeleton.named_parameters() if is_target(name, targets)]
    stacks = find_stacks(skeleton)
    if others := [name for name in named if name not in stacks]:
        raise ExportError(
            f"{adapter.folder}: target_parameters names {some(others)}, which"
            f" {'are' if others[1:] else 'is'} no stack of experts' matrices; merge it with peft"
        )
    matching = match_names(skeleton, stored)
    conversions = {conversion.target: conversion for conversion in matching.conversions}
    deltas: dict[str, StackPart] = {}
    for name, stack in describe_stacks(skeleton, named).items():
        delta = _delta(name, stack, adapter)
        if name in matching.direct:
            deltas[matching.direct[name]] = delta
        elif name in conversions:
            deltas |= _slices(conversions[name], delta, stored)
        else:
            raise ExportError(
                f"{adapter.folder} does not belong to this base: {name}, which it adapts, is not"
                " in it; nothing was written"
            )
    return deltas


def _delta(name: str, stack: Stack, adapter: Adapter) -> StackDelta:
    parts = adapter.modules.get(stack.adapter)
    if parts is None or "a" not in parts.keys:
        raise ExportError(
            f"{adapter.folder}: target_parameters names {name}, and no tensor of {stack.adapter} is"
            " in it; nothing was written"
        )
    a, b = parts.keys["a"], parts.keys["b"]
    rows, columns = adapter.shapes[a][0], adapter.shapes[b][1]
    sides = adapter.shapes[b][0], adapter.shapes[a][1]
    if rows != columns or rows % stack.experts or sides != (stack.outputs, stack.inputs):
        raise ExportError(
            f"{adapter.folder}: the matrices of {name} are {adapter.shapes[a]} and"
            f" {adapter.shapes[b]}, and the base has {stack.experts} experts of {stack.outputs} x"
            f" {stack.inputs}; nothing was written"
        )
    return StackDelta(
        a=a,
        b=b,
        scale=adapter.scale(name, rows // stack.experts),
        experts=stack.experts,
        is_transposed=stack.is_transposed,
    )


def _slices(
    conversion: Conversion, delta: StackDelta, stored: dict[str, TensorSpec]
) -> dict[str, ExpertDelta]:
    """Cut a delta into those of the tensors that transformers stacks.

    The matrices of one name are stacked expert by expert, and several names are joined along the
    outputs: ``MergeModulelist`` and ``Concatenate`` of ``transformers/core_model_loading.py``.

    Raises:
        ExportError: transformers does something else with them.
    """
    steps = [_describe_step(step) for step in conversion.converter.operations]
    is_known = steps == ["MergeModulelist 0", "Concatenate 1"][: len(steps)] and steps
    counts = {len(names) for names in conversion.sources.values()}
    if not is_known or delta.is_transposed or counts != {delta.experts}:
        raise ExportError(
            f"{conversion.target}: transformers makes it of the stored tensors by"
            f" {' and '.join(steps)}, and an adapter on it is not merged here; merge it with peft"
        )
    found: dict[str, ExpertDelta] = {}
    first_row = 0
    # The converter's order, whatever that of the files is.
    for pattern in conversion.converter.source_patterns:
        names = conversion.sources[pattern]
        for expert, name in enumerate(names):
            found[name] = ExpertDelta(
                a=delta.a,
                b=delta.b,
                scale=delta.scale,
                experts=delta.experts,
                expert=expert,
                first_row=first_row,
            )
        first_row += stored[names[0]].shape[0]
    return found


def _describe_step(step: Any) -> str:
    return f"{type(step).__name__} {getattr(step, 'dim', '')}".strip()

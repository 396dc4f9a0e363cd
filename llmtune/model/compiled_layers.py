"""Compile the layers of a model one by one (``train.compile=layers``), and count what came of it.

A layer is compiled once and its code serves all layers that are built alike, so that it takes the
time of one layer, not of the model. Lengths are symbols in the code, since rows differ in length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmtune import varlen_attention


@dataclass(frozen=True, slots=True)
class Compiled:
    """Graphs that the compiler made so far, and where it had to break off."""

    graphs: int
    """Pieces of code."""
    breaks: dict[str, int]
    """Reasons for which a piece ended before the layer did -> how often."""

    def describe(self, layers: int) -> str:
        """Say it in a sentence."""
        text = f"compiled: {layers} layers run as {self.graphs} graphs"
        if not self.breaks:
            return f"{text}, without a break"
        reason = next(iter(self.breaks)).splitlines()[0].strip()
        return f"{text}, with {sum(self.breaks.values())} breaks (first: {reason})"


def compile_layers(model: nn.Module) -> None:
    """Compile the layers of a model in place when they are first called.

    Names of parameters stay as they are. Call it after adapters were added.
    """
    # One document after the other is a loop over lengths that only the host knows.
    loop = varlen_attention.attend_one_by_one
    if not hasattr(loop, "_torchdynamo_disable"):
        varlen_attention.attend_one_by_one = torch.compiler.disable(loop)
    for layer in find_layers(model):
        layer.compile(dynamic=True)


def find_layers(model: nn.Module) -> list[nn.Module]:
    """Find the layers: the list of modules of one class that holds most parameters."""
    lists = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({type(inner) for inner in module}) == 1
    ]
    sizes = [sum(p.numel() for layer in layers for p in layer.parameters()) for layers in lists]
    return lists[sizes.index(max(sizes))] if lists else []


def count_compiled() -> Compiled:
    """Ask torch what it compiled in this process."""
    counters: Any = torch._dynamo.utils.counters
    return Compiled(
        graphs=int(counters["stats"]["unique_graphs"]), breaks=dict(counters["graph_break"])
    )

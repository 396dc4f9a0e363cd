"""Compare the names and shapes in a model's files with those of the model: what they lack would be random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmtune.model.weight_files import Entry, read_entries, read_slice
from llmtune.model.weight_names import Matching, find_missing, match_names, tied_groups
from llmtune.model.weight_report import WeightReport

#: Elements that are compared at once.
_BLOCK = 1 << 24


def compare_weights(model: Any, folder: Path) -> WeightReport:
    """Compare a model with the files of its folder; only their headers are read.

    Args:
        model: Of the folder's configuration, on the meta device.

    Raises:
        MissingPrerequisiteError: A file is missing, or is no whole safetensors file.
    """
    entries = read_entries(folder)
    matching = match_names(model, entries)
    state = model.state_dict()
    shapes = {name: entries[source].shape for name, source in matching.direct.items()}
    for conversion in matching.conversions:
        made = conversion.run(
            model, lambda name: torch.empty(entries[name].shape, dtype=entries[name].dtype, device="meta")
        )
        shapes |= {name: tuple(tensor.shape) for name, tensor in made.items()}
    reshaped = [
        f"{name} is {list(shape)} in the files and {list(state[name].shape)} in the model"
        for name, shape in sorted(shapes.items())
        if name in state and shape != tuple(state[name].shape)
    ]
    missing, tied = find_missing(model, shapes)
    buffers = {name for name, _ in model.named_buffers()} & state.keys()
    return WeightReport(
        missing=tuple(missing),
        reshaped=tuple(reshaped),
        tied=tuple(tied),
        untied=tuple(_find_untied(model, matching, entries)),
        defaults=tuple(sorted(buffers - shapes.keys())),
        unused=matching.unused,
    )


def _find_untied(model: Any, matching: Matching, entries: dict[str, Entry]) -> list[str]:
    """Of weights that are one by the configuration and twice in the files, those whose values differ."""
    found = []
    for group in tied_groups(model):
        first, *others = sorted(name for name in group if name in matching.direct) or [""]
        here = entries.get(matching.direct.get(first, ""))
        for other in others:
            there = entries[matching.direct[other]]
            if here is not None and here.shape == there.shape and not _are_equal(here, there):
                found.append(f"{first} and {other}")
    return found


def _are_equal(one: Entry, other: Entry) -> bool:
    count = torch.Size(one.shape).numel()
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        if not torch.equal(read_slice(one, start, size), read_slice(other, start, size)):
            return False
    return True

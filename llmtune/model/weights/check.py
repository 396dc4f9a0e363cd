"""Compare the names and shapes in a model's files with those of the model: what they lack would be
random.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from llmtune.model.weights.files import Entry, read_entries, read_slice
from llmtune.model.weights.names import Conversion, Matching, find_missing, match_names, tied_groups
from llmtune.model.weights.quantized import (
    find_meaningless,
    find_scaleless,
    is_packed,
    quantization,
    weight_entries,
)
from llmtune.model.weights.report import WeightReport

#: Elements that are compared at once.
_BLOCK = 1 << 24


def compare_weights(model: Any, folder: Path) -> WeightReport:
    """Compare a model with the files of its folder; only their headers are read.

    Args:
        model: Of the folder's configuration, on the meta device.

    Raises:
        MissingPrerequisiteError: A file is missing, or is no whole safetensors file.
    """
    stored = read_entries(folder)
    quantized = quantization(folder) is not None
    entries = weight_entries(stored) if quantized else stored
    packed = {name for name in entries if quantized and is_packed(name, stored)}
    matching = match_names(model, entries)
    state = model.state_dict()
    found = set(matching.direct)
    shapes = {
        name: entries[source].shape
        for name, source in matching.direct.items()
        if source not in packed
    }
    for conversion in matching.conversions:
        if packed & {name for names in conversion.sources.values() for name in names}:
            found |= _targets(conversion, state)
            continue
        made = conversion.run(
            model,
            lambda name: torch.empty(entries[name].shape, dtype=entries[name].dtype, device="meta"),
        )
        shapes |= {name: tuple(tensor.shape) for name, tensor in made.items()}
    found |= shapes.keys()
    reshaped = [
        f"{name} is {list(shape)} in the files and {list(state[name].shape)} in the model"
        for name, shape in sorted(shapes.items())
        if name in state and shape != tuple(state[name].shape)
    ]
    missing, tied = find_missing(model, found)
    buffers = {name for name, _ in model.named_buffers()} & state.keys()
    floating = {name for name, tensor in state.items() if tensor.is_floating_point()}
    return WeightReport(
        missing=(*missing, *(find_scaleless(stored) if quantized else ())),
        reshaped=tuple(reshaped),
        tied=tuple(tied),
        untied=tuple(_find_untied(model, matching, entries)),
        defaults=tuple(sorted(buffers - found)),
        unused=matching.unused,
        meaningless=() if quantized else tuple(find_meaningless(matching.direct, stored, floating)),
    )


def _targets(conversion: Conversion, state: dict[str, Any]) -> set[str]:
    """What comes of tensors that cannot be computed here, because they are packed: by the names
    alone.
    """
    patterns = [re.compile(pattern) for pattern in conversion.converter.target_patterns]
    begin = min(
        (match.start() for one in patterns if (match := one.search(conversion.target))), default=0
    )
    beside = {name for name in state if name.startswith(conversion.target[:begin])}
    return {
        conversion.target,
        *(name for name in beside if any(one.search(name) for one in patterns)),
    }


def _find_untied(model: Any, matching: Matching, entries: dict[str, Entry]) -> list[str]:
    """Of weights that are one by the configuration and twice in the files, those whose values
    differ.
    """
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

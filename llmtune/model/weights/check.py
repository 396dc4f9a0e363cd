"""Compare the names and shapes in a model's files with the model's."""

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

#: Elements that are compared at a time.
_BLOCK = 1 << 24


def compare_weights(model: Any, folder: Path) -> WeightReport:
    """Compare a model with the files of its folder; only their headers are read.

    Args:
        model: The model of the folder's configuration, on the meta device.

    Raises:
        MissingPrerequisiteError: A file is missing, or is not a complete safetensors file.
    """
    # Of quantized weights, the names of what they represent are compared.
    stored = read_entries(folder)
    quantized = quantization(folder) is not None
    entries = weight_entries(stored) if quantized else stored
    packed = {name for name in entries if quantized and is_packed(name, stored)}
    matching = match_names(model, entries)
    state = model.state_dict()

    # Names and shapes of the model's tensors that the files give.
    given_names = set(matching.direct)
    shapes = {
        name: entries[source].shape
        for name, source in matching.direct.items()
        if source not in packed
    }
    for conversion in matching.conversions:
        if any(packed.intersection(names) for names in conversion.sources.values()):
            given_names |= _targets(conversion, state)
            continue
        made = conversion.run(
            model,
            lambda name: torch.empty(entries[name].shape, dtype=entries[name].dtype, device="meta"),
        )
        shapes |= {name: tuple(tensor.shape) for name, tensor in made.items()}
    given_names |= shapes.keys()

    # What differs.
    reshaped = [
        f"{name} is {list(shape)} in the files and {list(state[name].shape)} in the model"
        for name, shape in sorted(shapes.items())
        if name in state and shape != tuple(state[name].shape)
    ]
    missing, tied = find_missing(model, given_names)
    buffers = {name for name, _ in model.named_buffers()} & state.keys()
    floating = {name for name, tensor in state.items() if tensor.is_floating_point()}
    return WeightReport(
        missing=(*missing, *(find_scaleless(stored) if quantized else ())),
        reshaped=tuple(reshaped),
        tied=tuple(tied),
        untied=tuple(_find_untied(model, matching, entries)),
        defaults=tuple(sorted(buffers - given_names)),
        unused=matching.unused,
        meaningless=() if quantized else tuple(find_meaningless(matching.direct, stored, floating)),
    )


def _targets(conversion: Conversion, state: dict[str, Any]) -> set[str]:
    """Name the tensors that a conversion of packed sources makes, without computing it."""
    patterns = [re.compile(pattern) for pattern in conversion.converter.target_patterns]
    matches = [pattern.search(conversion.target) for pattern in patterns]
    begin = min((match.start() for match in matches if match), default=0)
    prefix = conversion.target[:begin]
    targets = {conversion.target}
    for name in state:
        if name.startswith(prefix) and any(pattern.search(name) for pattern in patterns):
            targets.add(name)
    return targets


def _find_untied(model: Any, matching: Matching, entries: dict[str, Entry]) -> list[str]:
    """Find tied weights that the files hold twice, with different values."""
    untied = []
    for group in tied_groups(model):
        stored = sorted(name for name in group if name in matching.direct)
        for other in stored[1:]:
            first_entry = entries[matching.direct[stored[0]]]
            entry = entries[matching.direct[other]]
            if first_entry.shape == entry.shape and not _are_equal(first_entry, entry):
                untied.append(f"{stored[0]} and {other}")
    return untied


def _are_equal(one: Entry, other: Entry) -> bool:
    count = torch.Size(one.shape).numel()
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        if not torch.equal(read_slice(one, start, size), read_slice(other, start, size)):
            return False
    return True

"""Match the tensors of a model's files with the model's, by the rules of transformers' loading.

A file's names are not always the model's: prefixes of the base model come and go (``wte.weight`` is
GPT-2's ``transformer.wte.weight``), older names live on (``LayerNorm.gamma``), and experts that are
stored one by one are stacked. transformers has the rules for this
(``transformers.conversion_mapping``). Here they are applied to names and shapes alone, so that
missing weights are known before anything is read, and so that a rank of ZeRO 3 reads only its own
slices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Conversion:
    """Tensors of the model that are computed from several of the files, such as stacked experts."""

    target: str
    """The first of the model's tensors that it makes."""
    converter: Any
    """transformers' ``WeightConverter``."""
    sources: dict[str, list[str]] = field(default_factory=dict)
    """Pattern of the converter -> names in the files, in the order in which they are used."""

    def run(self, model: Any, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Compute the model's tensors, by name.

        Args:
            read: Reads a tensor of the files by its name.
        """
        converter = deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(self.target, name, pattern, read(name))
        made = converter.convert(self.target, model=model, config=model.config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }


@dataclass(frozen=True, slots=True)
class Matching:
    """The tensors of a model that its files give."""

    direct: dict[str, str]
    """Name in the model -> name in the files, for tensors that are used as they are."""
    conversions: tuple[Conversion, ...]
    unused: tuple[str, ...]
    """Names in the files that are no part of the model."""


def match_names(model: Any, stored: Iterable[str]) -> Matching:
    """Match the names in the files with the model's.

    Args:
        model: A transformers model on any device; only names are used.
        stored: Names in the files.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    # The rules of transformers for this architecture: new names, and stacked tensors.
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern: dict[str, Any] = {}
    for converter in converters:
        by_pattern |= dict.fromkeys(converter.source_patterns, converter)
    prefix, state = model.base_model_prefix, model.state_dict()
    direct: dict[str, str] = {}
    conversions: dict[str, Conversion] = {}
    unused = []
    # This is the order in which transformers stacks: layer 2 before layer 10.
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            unused.append(name)
        elif pattern is None:
            direct[target] = name
        else:
            conversion = conversions.setdefault(target, Conversion(target, by_pattern[pattern]))
            conversion.sources.setdefault(pattern, []).append(name)
    return Matching(direct, tuple(conversions.values()), tuple(_without_ignored(model, unused)))


def _without_ignored(model: Any, names: list[str]) -> list[str]:
    """Drop the names that the architecture ignores, such as computed rotary frequencies."""
    patterns = [
        *(model._keys_to_ignore_on_load_unexpected or ()),
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
    ]

    def is_ignored(name: str) -> bool:
        return any(re.search(pattern, name) for pattern in patterns)

    return [name for name in names if not is_ignored(name)]


def tied_groups(model: Any) -> list[frozenset[str]]:
    """Group the names that the configuration ties to one weight."""
    groups: dict[str, set[str]] = {}
    for target, source in dict(model.all_tied_weights_keys).items():
        group = groups.get(source, {source}) | groups.get(target, {target})
        groups |= dict.fromkeys(group, group)
    return sorted({frozenset(group) for group in groups.values()}, key=min)


def find_missing(model: Any, stored: Mapping[str, Any] | set[str]) -> tuple[list[str], list[str]]:
    """Find the parameters that no file holds, and those that are tied to one in the files.

    Args:
        stored: Names of the model's tensors that the files give.
    """
    groups = tied_groups(model)
    ignored = [re.compile(pattern) for pattern in (model._keys_to_ignore_on_load_missing or ())]
    missing, tied = [], []
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name in stored or any(pattern.search(name) for pattern in ignored):
            continue
        others = next((group for group in groups if name in group), frozenset())
        if any(other in stored for other in others):
            tied.append(name)
        elif not others or name == min(others):
            missing.append(name)
    return missing, tied

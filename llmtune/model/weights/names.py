"""Which tensors of a model's files become which of the model, by the rules of transformers' own
loading.

A file's names are not always the model's: prefixes of the base model come and go (``wte.weight`` is
GPT-2's ``transformer.wte.weight``), older names live on (``LayerNorm.gamma``), and experts that are
stored one by one are stacked. transformers has the rules for it
(``transformers.conversion_mapping``); here they are applied to names and shapes alone, so that it
is known what a model lacks before anything is read, and so that a rank of ZeRO 3 reads its own
slices only.
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
    """Tensors of the files that are computed into tensors of the model, such as experts that are
    stacked.
    """

    target: str
    """The first of the model's tensors that come of it."""
    converter: Any
    """transformers' ``WeightConverter``."""
    sources: dict[str, list[str]] = field(default_factory=dict)
    """Pattern of the converter -> names in the files, in the order in which they are taken."""

    def run(self, model: Any, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's tensors by name.

        Args:
            read: A tensor of the files by its name.
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
    """What of a model is in its files."""

    direct: dict[str, str]
    """Name in the model -> name in the files, for tensors that are taken as they are."""
    conversions: tuple[Conversion, ...]
    unused: tuple[str, ...]
    """In the files, and in no model of this architecture as it is trained here."""


def match_names(model: Any, stored: Iterable[str]) -> Matching:
    """Match the names in the files with the model's.

    Args:
        model: Of transformers, on any device: only names are looked at.
        stored: Names in the files.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {
        pattern: converter for converter in converters for pattern in converter.source_patterns
    }
    prefix, state = model.base_model_prefix, model.state_dict()
    direct: dict[str, str] = {}
    conversions: dict[str, Conversion] = {}
    unused = []
    # The order is that of transformers, which stacks in it: layer 2 before layer 10.
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            unused.append(name)
        elif pattern is None:
            direct[target] = name
        else:
            one = conversions.setdefault(target, Conversion(target, by_pattern[pattern]))
            one.sources.setdefault(pattern, []).append(name)
    return Matching(direct, tuple(conversions.values()), tuple(_passed_over(model, unused)))


def _passed_over(model: Any, names: list[str]) -> list[str]:
    """Without those that the architecture leaves out on purpose, such as rotary frequencies, which
    are computed.
    """
    patterns = [
        *(model._keys_to_ignore_on_load_unexpected or ()),
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
    ]
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]


def tied_groups(model: Any) -> list[frozenset[str]]:
    """Names that the configuration makes one weight: whoever has one of a group has all."""
    groups: dict[str, set[str]] = {}
    for target, source in dict(model.all_tied_weights_keys).items():
        group = groups.get(source, {source}) | groups.get(target, {target})
        groups |= dict.fromkeys(group, group)
    return sorted({frozenset(group) for group in groups.values()}, key=min)


def find_missing(model: Any, found: Mapping[str, Any] | set[str]) -> tuple[list[str], list[str]]:
    """Parameters that are nowhere in the files, and those that are another one's by the
    configuration.

    Args:
        found: Names of the model for which the files hold something.
    """
    groups = tied_groups(model)
    ignored = [re.compile(pattern) for pattern in (model._keys_to_ignore_on_load_missing or ())]
    missing, tied = [], []
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name in found or any(pattern.search(name) for pattern in ignored):
            continue
        others = next((group for group in groups if name in group), frozenset())
        if any(other in found for other in others):
            tied.append(name)
        elif not others or name == min(others):
            missing.append(name)
    return missing, tied

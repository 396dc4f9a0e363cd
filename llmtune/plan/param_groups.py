"""Choose the settings of every trained parameter, and say which parameters have which."""

from __future__ import annotations

import re

from llmtune.config.groups.optim import OptimConfig
from llmtune.config.groups.tuner import TunerConfig
from llmtune.errors import ConfigError
from llmtune.optimizer.param_groups import (
    DEFAULT_GROUP,
    GroupOf,
    ParamGroup,
    entry_key,
    group_by_name,
)
from llmtune.plan.memory.shapes import ModelShape
from llmtune.tuner.tuner import TUNERS
from llmtune.units import counted, format_count


def resolve_groups(optim: OptimConfig, tuner: TunerConfig) -> GroupOf:
    """Return the function that finds the settings of a trained parameter by its plain name.

    Those of ``optim.param_groups`` come before what the tuner sets.
    """
    kind = TUNERS.find(tuner.kind)

    def of_tuner(name: str) -> ParamGroup:
        if (found := kind.find_rate_factor(name, tuner)) is None:
            return DEFAULT_GROUP
        key, factor = found
        return ParamGroup(label=key, learning_rate_factor=factor)

    return group_by_name(optim, of_tuner)


def check_groups(optim: OptimConfig, shape: ModelShape) -> None:
    """Refuse entries of ``optim.param_groups`` that change nothing.

    Raises:
        ConfigError: No trained parameter has a name that the pattern is found in, or all of them
            are taken by earlier entries; or only vectors do, and the entry sets a weight decay,
            which vectors do not have.
    """
    for index, entry in enumerate(optim.param_groups):
        key, pattern = entry_key(index), entry["pattern"]
        only = OptimConfig(param_groups=[entry])
        group_of = group_by_name(only)
        found = [t for t in shape.tensors if t.trained and group_of(t.name).label]
        if not found:
            raise ConfigError(
                f"{key}.pattern={pattern} is found in the name of no trained parameter; there are"
                f" {list_names(shape)} (N is the number of a layer)"
            )
        taken = group_by_name(OptimConfig(param_groups=optim.param_groups[:index]))
        if all(taken(tensor.name).label for tensor in found):
            raise ConfigError(
                f"{key}.pattern={pattern}: every parameter that it is found in has the settings of"
                f" an earlier entry, such as {taken(found[0].name).label}: the first entry counts;"
                " put the narrower pattern first"
            )
        if entry.get("weight_decay") and all(tensor.vector for tensor in found):
            raise ConfigError(
                f"{key}.weight_decay={entry['weight_decay']}: {pattern} is found in vectors alone,"
                f" such as {found[0].name}, which have no weight decay; leave it out"
            )


def describe_groups(
    optim: OptimConfig, tuner: TunerConfig, shape: ModelShape, learning_rate: float
) -> list[str]:
    """Describe the parameters that have settings of their own, one line per group.

    Args:
        learning_rate: The peak rate of all others.
    """
    group_of = resolve_groups(optim, tuner)
    members: dict[ParamGroup, list[str]] = {}
    sizes: dict[ParamGroup, int] = {}
    for tensor in shape.tensors:
        group = group_of(tensor.name) if tensor.trained else DEFAULT_GROUP
        if group != DEFAULT_GROUP:
            members.setdefault(group, []).append(tensor.name)
            sizes[group] = sizes.get(group, 0) + tensor.numel
    lines = []
    for group, names in members.items():
        settings = []
        if (factor := group.rate_factor(learning_rate)) != 1.0:
            settings.append(f"learning rate {learning_rate * factor:g}")
        if group.weight_decay is not None:
            settings.append(f"weight decay of matrices {group.weight_decay:g}")
        lines.append(
            f"{group.label}: {', '.join(settings)} for {counted(len(names), 'tensor')} of"
            f" {format_count(sizes[group])} parameters, from {names[0]} on"
        )
    return lines


def list_names(shape: ModelShape) -> str:
    """List the names of trained parameters, once for all layers."""
    names = [re.sub(r"\.\d+\.", ".N.", t.name) for t in shape.tensors if t.trained]
    return ", ".join(dict.fromkeys(names))

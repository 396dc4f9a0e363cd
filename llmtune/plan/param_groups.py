"""Choose the settings of every trained parameter, and say which parameters have which."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from llmtune.config.groups.optim import OptimConfig
from llmtune.config.groups.tuner import TunerConfig
from llmtune.errors import ConfigError
from llmtune.optimizer.optimizer import Optimizer, find_optimizer
from llmtune.optimizer.param_groups import (
    DEFAULT_GROUP,
    GroupOf,
    ParamGroup,
    entry_key,
    group_by_name,
    plain_name,
)
from llmtune.plan.memory.shapes import ModelShape
from llmtune.tuner.head import in_modules
from llmtune.tuner.layer_matrices import find_layer_matrices
from llmtune.tuner.tuner import TUNERS
from llmtune.units import counted, format_count


def resolve_groups(
    optim: OptimConfig, tuner: TunerConfig, matrices: Collection[str] = ()
) -> GroupOf:
    """Return the function that finds the settings of a trained parameter by its plain name.

    Those of ``optim.param_groups`` come before what the tuner sets.

    Args:
        matrices: Plain names of the matrices of layers.
    """
    kind = TUNERS.find(tuner.kind)

    def of_tuner(name: str) -> ParamGroup:
        if (found := kind.find_rate_factor(name, tuner)) is None:
            return DEFAULT_GROUP
        key, factor = found
        return ParamGroup(label=key, learning_rate_factor=factor)

    group_of = group_by_name(optim, of_tuner)
    if find_optimizer(optim).matrix is None:
        return group_of
    return lambda name: replace(group_of(name), is_matrices=name in matrices)


def groups_of_shape(optim: OptimConfig, tuner: TunerConfig, shape: ModelShape) -> GroupOf:
    """Return :func:`resolve_groups` for the model of a plan."""
    matrices = {tensor.name for tensor in shape.tensors if tensor.layer_matrix}
    return resolve_groups(optim, tuner, matrices)


def groups_of_model(
    optim: OptimConfig, tuner: TunerConfig, model: Any, head: Sequence[str]
) -> GroupOf:
    """Return :func:`resolve_groups` for a model with its adapters.

    Args:
        head: Names of the modules that are the task's head.
    """
    names = {plain_name(name) for name in find_layer_matrices(model)}
    return resolve_groups(optim, tuner, {name for name in names if not in_modules(name, head)})


def fit_optimizer(optimizer: Optimizer, shape: ModelShape) -> Optimizer:
    """Return the optimizer with what a plan needs to know of the parameters' shapes.

    Raises:
        ConfigError: It has a rule for matrices of layers, and none is trained.
    """
    trained = [tensor for tensor in shape.tensors if tensor.trained]
    if optimizer.state_shapes is not None:
        stored = sum(
            math.prod(state)
            for tensor in trained
            for state in optimizer.state_shapes(tensor.shape).values()
        )
        return replace(
            optimizer,
            states_per_parameter=stored / shape.trainable_parameters,
            whole_numel=max(tensor.numel for tensor in trained),
        )
    if optimizer.matrix is None:
        return optimizer
    numels = [tensor.numel for tensor in trained if tensor.layer_matrix]
    if not numels:
        raise ConfigError(
            f"optim={optimizer.name}: no matrix of a layer is trained, and everything else has"
            f" {optimizer.title}; take optim=adamw"
        )
    share = sum(numels) / shape.trainable_parameters
    of_matrices, of_others = len(optimizer.matrix.states), len(optimizer.states)
    return replace(
        optimizer,
        states_per_parameter=share * of_matrices + (1 - share) * of_others,
        whole_numel=max(numels),
    )


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
            names = list_names(tensor.name for tensor in shape.tensors if tensor.trained)
            raise ConfigError(
                f"{key}.pattern={pattern} is found in the name of no trained parameter; there are"
                f" {names} (N is the number of a layer)"
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
    group_of = groups_of_shape(optim, tuner, shape)
    lines = _describe_rules(find_optimizer(optim), shape)
    members: dict[ParamGroup, list[str]] = {}
    sizes: dict[ParamGroup, int] = {}
    for tensor in shape.tensors:
        group = DEFAULT_GROUP
        if tensor.trained:
            group = replace(group_of(tensor.name), is_matrices=False)
        if group != DEFAULT_GROUP:
            members.setdefault(group, []).append(tensor.name)
            sizes[group] = sizes.get(group, 0) + tensor.numel
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


def _describe_rules(optimizer: Optimizer, shape: ModelShape) -> list[str]:
    """Say which parameters have the rule for matrices, and which the other one."""
    if optimizer.matrix is None:
        return []
    trained = [tensor for tensor in shape.tensors if tensor.trained]
    lines = []
    for title, is_matrix in ((optimizer.matrix.title, True), (optimizer.title, False)):
        members = [tensor for tensor in trained if tensor.layer_matrix is is_matrix]
        if not members:
            lines.append(f"{title}: no parameter")
            continue
        size = format_count(sum(tensor.numel for tensor in members))
        names = list_names(tensor.name for tensor in members)
        lines.append(f"{title}: {counted(len(members), 'tensor')} of {size} parameters ({names})")
    if any(tensor.adapter for tensor in trained):
        lines[0] += ", each of an adapter's two matrices by itself"
    return lines


def list_names(names: Iterable[str]) -> str:
    """List the names of parameters, once for all layers."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names))

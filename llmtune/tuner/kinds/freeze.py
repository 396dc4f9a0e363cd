"""Partial fine-tuning: a part of the model's own parameters is trained, and the rest is frozen."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, ClassVar

from llmtune.config.groups.tuner import TunerConfig
from llmtune.errors import ConfigError
from llmtune.tuner.blocks import find_blocks, find_following
from llmtune.tuner.head import in_modules
from llmtune.tuner.pattern_limits import pattern_problem
from llmtune.tuner.tuner import TUNERS, Tuner


class FreezeTuner(Tuner):
    """Train the last layers, or the parameters whose names match a pattern."""

    name = "freeze"
    title = "partial fine-tuning"
    reads_freeze = True
    #: Those of full fine-tuning, whose weights they are.
    learning_rates: ClassVar = [(1e9, 5e-5), (float("inf"), 1e-5)]

    def find_problems(self, config: TunerConfig) -> list[str]:
        """Find a choice that is missing or made twice, and an expression that is none."""
        problems = super().find_problems(config)
        layers, pattern = config.freeze.last_layers, config.freeze.pattern
        if layers is None and pattern is None:
            problems.append(
                "tuner=freeze needs tuner.freeze.last_layers=2, or tuner.freeze.pattern=REGEX for"
                " the names of parameters"
            )
        if layers is not None and pattern is not None:
            problems.append(
                f"tuner.freeze.last_layers={layers} and tuner.freeze.pattern={pattern}: one of them"
                " chooses what is trained; add tuner.freeze.last_layers=null to take the pattern"
            )
        if pattern is not None and (problem := pattern_problem(pattern)):
            problems.append(f"tuner.freeze.pattern={pattern}: {problem}")
        return problems

    def choose_parameters(self, model: Any, config: TunerConfig) -> set[str]:
        """Choose the parameters that ``tuner.freeze`` names.

        Raises:
            ConfigError: The model has fewer layers, or no such parameter.
        """
        if config.freeze.pattern is not None:
            return _choose_matching(model, config.freeze.pattern)
        assert config.freeze.last_layers is not None
        return _choose_last(model, config.freeze.last_layers)

    def describe(self, config: TunerConfig) -> str:
        """Describe the tuner with what it trains."""
        layers = config.freeze.last_layers
        if layers is None:
            return f"{self.title} of {config.freeze.pattern}"
        return f"{self.title} of the last {'layer' if layers == 1 else f'{layers} layers'}"


def _choose_last(model: Any, layers: int) -> set[str]:
    """Choose the parameters of the last blocks, and those between them and the head."""
    blocks = find_blocks(model)
    if blocks is None:
        raise ConfigError(
            f"tuner.freeze.last_layers={layers}: the model has no list of layers; take"
            f" tuner.freeze.pattern=REGEX, with names such as {_list_names(_own_names(model))}"
        )
    count = len(blocks.modules)
    if layers > count:
        raise ConfigError(
            f"tuner.freeze.last_layers={layers}: the model has {count}, from {blocks.path(0)} to"
            f" {blocks.path(count - 1)}; tuner=full trains all of it"
        )
    chosen = [blocks.path(index) for index in range(count - layers, count)]
    chosen += find_following(model, blocks)
    return {name for name in _own_names(model).values() if in_modules(name, chosen)}


def _choose_matching(model: Any, pattern: str) -> set[str]:
    names = _own_names(model)
    chosen = {own for name, own in names.items() if re.search(pattern, name)}
    if not chosen:
        raise ConfigError(
            f"tuner.freeze.pattern={pattern} matches no parameter; the model has"
            f" {_list_names(names)} (N is the number of a layer)"
        )
    return chosen


def _own_names(model: Any) -> dict[str, str]:
    """Map every name of a parameter to its first; a tied one has several.

    What the architecture itself freezes is left out.
    """
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        name: own[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    }


def _list_names(names: Iterable[str]) -> str:
    """List names of parameters, once for all layers."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names))


TUNERS.register(FreezeTuner())

"""The rank and scale of a LoRA layer, by the rules of peft."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from llmtune.config.groups.tuner import TunerConfig
from llmtune.errors import ConfigError
from llmtune.tuner.pattern_limits import pattern_problem

#: Values of ``tuner.bias``, which are peft's.
BIASES = ("none", "all", "lora_only")

#: Values of ``tuner.init_lora_weights`` beside ``pissa_niter_N``.
_STARTS = ("default", "gaussian", "orthogonal", "olora", "pissa", "loftq")
#: The start of adapters that make up for what a quantization to 4 bits takes from the base.
LOFTQ = "loftq"
_NITER = re.compile(r"pissa_niter_([1-9]\d{0,2})")

#: Rows of a weight out of which an adapter's start is taken at once. They are always the same
#: blocks, so that a rank that needs a few rows gets the same digits as one that needs them all.
TAKEN_ROWS = 1024

#: Signs of regular expressions that no module's name has.
_PATTERN_SIGNS = frozenset("*+?^$()[]{}|\\")


def match_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Find a module's value in a ``rank_pattern`` or ``alpha_pattern``.

    As in ``peft.utils.other.get_pattern_key``, the first key counts that matches the full name, or
    its end behind a dot.
    """
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def lora_rank(tuner: TunerConfig, module: str) -> int:
    """Return the rank of a module: the columns of its ``lora_B``."""
    return int(match_pattern(tuner.rank_pattern, module, tuner.lora_r))


def check_patterns(tuner: TunerConfig, modules: Collection[str]) -> None:
    """Refuse patterns where the order of keys matters.

    peft sorts the keys when it stores an adapter, which would then be another one.

    Raises:
        ConfigError: With the first module whose value depends on the order.
    """
    patterns = {"rank_pattern": tuner.rank_pattern, "alpha_pattern": tuner.alpha_pattern}
    for name, pattern in patterns.items():
        ordered = dict(sorted(pattern.items()))
        for module in modules:
            first = match_pattern(pattern, module, None)
            stored = match_pattern(ordered, module, None)
            if first != stored:
                raise ConfigError(
                    f"tuner.{name}={pattern}: {module} is {first} by the first key that matches and"
                    f" {stored} in the stored adapter, whose keys peft sorts; write the keys so"
                    " that one alone matches it"
                )


def find_setting_problems(tuner: TunerConfig) -> list[str]:
    """Find settings of adapters that are impossible by themselves, in words a user can act on."""
    problems = _find_pattern_problems("rank_pattern", tuner.rank_pattern, (int,))
    problems += _find_pattern_problems("alpha_pattern", tuner.alpha_pattern, (int, float))
    # Stacks of experts alone may have adapters.
    is_named = tuner.target_modules != "all-linear"
    if is_named and not (tuner.target_modules == [] and tuner.target_parameters):
        problems += _find_target_problems("target_modules", tuner.target_modules)
    if tuner.exclude_modules is not None:
        problems += _find_target_problems("exclude_modules", tuner.exclude_modules)
    if wrong := [index for index in tuner.layers_to_transform if index < 0]:
        problems.append(
            f"tuner.layers_to_transform={tuner.layers_to_transform}: {wrong[0]} is no number of a"
            " layer; they are counted from 0"
        )
    if tuner.bias not in BIASES:
        problems.append(f"tuner.bias={tuner.bias}: {', '.join(BIASES)}")
    return [*problems, *_find_start_problems(tuner), *_find_stack_problems(tuner)]


def _find_target_problems(key: str, targets: Any) -> list[str]:
    if isinstance(targets, str) and set(targets) & _PATTERN_SIGNS:
        problem = pattern_problem(targets)
        return [f"tuner.{key}={targets}: {problem}"] if problem else []
    if isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets):
        return []
    word = "'all-linear', " if key == "target_modules" else ""
    return [
        f"tuner.{key}={targets}: {word}a regular expression for whole names such as '.*q_proj', or"
        " a list such as [q_proj,v_proj]"
    ]


def _find_start_problems(tuner: TunerConfig) -> Iterator[str]:
    """Find a start that peft does not have, or that this adapter cannot have."""
    start = tuner.init_lora_weights
    shown = f"tuner.init_lora_weights={start}"
    if start not in _STARTS and not _NITER.fullmatch(start):
        yield f"{shown}: {', '.join(_STARTS)}, or pissa_niter_N with a number N of iterations"
    if begins_from_base(tuner) and tuner.adapter_path:
        yield (
            f"{shown} with tuner.adapter_path={tuner.adapter_path}: the adapter has its values;"
            " leave tuner.init_lora_weights out"
        )
    ranks = {"lora_r": tuner.lora_r, **tuner.rank_pattern}
    odd = [f"{key}={rank}" for key, rank in ranks.items() if isinstance(rank, int) and rank % 2]
    if start == "orthogonal" and odd:
        yield f"{shown} needs even ranks, and tuner has {odd[0]}"


def _find_stack_problems(tuner: TunerConfig) -> Iterator[str]:
    """Find settings that adapters on stacks of experts do not have; peft refuses them too."""
    if not tuner.target_parameters:
        return
    shown = f"tuner.target_parameters={tuner.target_parameters}"
    if tuner.use_dora:
        yield f"{shown} with tuner.use_dora=true: stacks of experts have no DoRA; leave one out"
    if tuner.lora_dropout:
        yield (
            f"{shown} with tuner.lora_dropout={tuner.lora_dropout}: B @ A is added to the experts'"
            " weights before they meet their inputs, so that there is nothing to drop; take"
            " tuner.lora_dropout=0"
        )
    if tuner.init_lora_weights not in ("default", "gaussian"):
        yield (
            f"{shown} with tuner.init_lora_weights={tuner.init_lora_weights}: stacks of experts"
            " begin as default or gaussian"
        )
    if tuner.adapter_path:
        yield (
            f"{shown} with tuner.adapter_path={tuner.adapter_path}: an adapter on stacks of experts"
            " is not trained on from a folder; leave one out"
        )


def changes_base(tuner: TunerConfig) -> bool:
    """Tell whether the adapter begins with a part of the base's weights, which the base loses."""
    return tuner.init_lora_weights.startswith(("pissa", "olora"))


def begins_from_base(tuner: TunerConfig) -> bool:
    """Tell whether the adapter's first values are computed from the base's weights."""
    return changes_base(tuner) or tuner.init_lora_weights == LOFTQ


def iterations(start: str) -> int | None:
    """Return N of ``pissa_niter_N``; None for a full decomposition."""
    match = _NITER.fullmatch(start)
    return int(match[1]) if match else None


def _find_pattern_problems(
    key: str, pattern: Mapping[str, Any], kinds: tuple[type, ...]
) -> list[str]:
    invalid = {name: value for name, value in pattern.items() if not _is_positive(value, kinds)}
    if not invalid:
        return []
    return [f"tuner.{key}={invalid}: numbers above 0 by module, such as {{q_proj: 8}}"]


def _is_positive(value: Any, kinds: tuple[type, ...]) -> bool:
    # In Python a bool is an int, and ``nan <= 0`` is false.
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    return is_number and bool(0 < value < math.inf)


def lora_scale(alpha: float, rank: int, use_rslora: bool) -> float:
    """Return the factor of ``B @ A``: alpha / r, or alpha / sqrt(r) for rsLoRA.

    See https://arxiv.org/abs/2312.03732.
    """
    return alpha / (math.sqrt(rank) if use_rslora else rank)

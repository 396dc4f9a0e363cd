"""The rank and scale of a LoRA layer, by the rules of peft."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from llmtune.config.groups.tuner import TunerConfig
from llmtune.errors import ConfigError


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
    """Find pattern values that are not numbers above 0, and targets that are not names."""
    problems = _find_pattern_problems("rank_pattern", tuner.rank_pattern, (int,))
    problems += _find_pattern_problems("alpha_pattern", tuner.alpha_pattern, (int, float))
    modules = tuner.target_modules
    is_list = isinstance(modules, list) and all(isinstance(name, str) for name in modules)
    if modules != "all-linear" and not (is_list and modules):
        problems.append(
            f"tuner.target_modules={modules}: 'all-linear', or a list such as [q_proj,v_proj]"
        )
    return problems


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

"""Which rank and which scale a LoRA layer has, by the rules of peft."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llmtune.config.groups.tuner import TunerConfig
from llmtune.errors import ConfigError


def match_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """A module's value in a ``rank_pattern`` or ``alpha_pattern``.

    As ``peft.utils.other.get_pattern_key`` has it, the first key counts that matches the whole
    name, or its end behind a dot.
    """
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def lora_rank(tuner: TunerConfig, module: str) -> int:
    """Columns of the module's ``lora_B``."""
    return int(match_pattern(tuner.rank_pattern, module, tuner.lora_r))


def check_patterns(tuner: TunerConfig, modules: Iterable[str]) -> None:
    """Refuse patterns whose order decides: peft sorts their keys when it stores an adapter, which
    would be another one then.

    Raises:
        ConfigError: With the module for which it does.
    """
    patterns = {"rank_pattern": tuner.rank_pattern, "alpha_pattern": tuner.alpha_pattern}
    for name, pattern in patterns.items():
        ordered = dict(sorted(pattern.items()))
        for module in modules if len(pattern) > 1 else ():
            first, stored = (
                match_pattern(pattern, module, None),
                match_pattern(ordered, module, None),
            )
            if first != stored:
                raise ConfigError(
                    f"tuner.{name}={pattern}: {module} is {first} by the first key that matches and"
                    f" {stored} in the stored adapter, whose keys peft sorts; write the keys so"
                    " that one alone matches it"
                )


def find_setting_problems(tuner: TunerConfig) -> list[str]:
    """Patterns whose values are no numbers above 0, and targets that are no names."""
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
    wrong = {name: value for name, value in pattern.items() if not _is_positive(value, kinds)}
    if not wrong:
        return []
    return [f"tuner.{key}={wrong}: numbers above 0 by module, such as {{q_proj: 8}}"]


def _is_positive(value: Any, kinds: tuple[type, ...]) -> bool:
    # A truth value is an integer to Python, and ``nan`` is not at most 0.
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    return is_number and bool(0 < value < math.inf)


def lora_scale(alpha: float, rank: int, use_rslora: bool) -> float:
    """What ``B @ A`` is multiplied with: alpha / r, or alpha / sqrt(r) for rsLoRA
    (https://arxiv.org/abs/2312.03732).
    """
    return alpha / (math.sqrt(rank) if use_rslora else rank)

"""Settings of single parameters: the entries of ``optim.param_groups``, and what a tuner adds.

A parameter is known by the name that the plan and the engine give it (:func:`plain_name`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmtune.config.groups.optim import OptimConfig

#: Keys of an entry, and how each is described.
_KEYS = {
    "pattern": "a regular expression for names of parameters",
    "learning_rate": "a number above 0",
    "weight_decay": "a number of at least 0",
}

#: peft's parts of a parameter's name that the model itself does not have. In the name of an adapter
#: ``base_layer`` says which of a module's stacks of experts it belongs to.
_PEFT_PREFIX = "base_model.model."
_PEFT_INFIX = re.compile(
    r"\.modules_to_save\.default(?=\.)|(\.base_layer)+(?=\.(?!lora_|base_layer))"
)

#: The entry of a torch optimizer's group that multiplies the learning rate of every step.
RATE_FACTOR = "learning_rate_factor"
#: The entry of a group whose parameters are updated by the optimizer's rule for whole matrices.
IS_MATRICES = "is_matrices"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamGroup:
    """Settings that some parameters have in place of the optimizer's."""

    label: str = ""
    """The keys that give them; empty for parameters that have the optimizer's."""
    learning_rate: float | None = None
    """Peak learning rate; None for the optimizer's."""
    learning_rate_factor: float = 1.0
    """Multiplies the optimizer's peak learning rate, where there is no other one."""
    weight_decay: float | None = None
    """Decay of matrices; None for the optimizer's. Vectors have none."""
    is_matrices: bool = False
    """They are updated by the optimizer's rule for whole matrices."""

    @property
    def key(self) -> str:
        """Return what tells groups apart; empty for parameters that nothing sets apart."""
        return f"{self.label} (whole matrices)" if self.is_matrices else self.label

    def rate_factor(self, peak: float) -> float:
        """Return what multiplies the learning rate of every step.

        Args:
            peak: The optimizer's peak learning rate.
        """
        if self.learning_rate is None:
            return self.learning_rate_factor
        return self.learning_rate / peak

    def over(self, other: ParamGroup) -> ParamGroup:
        """Return these settings, with those of another group where this one says nothing."""
        labels = [label for label in (self.label, other.label) if label]
        rate, factor = other.learning_rate, other.learning_rate_factor
        if self.learning_rate is not None or self.learning_rate_factor != 1.0:
            rate, factor = self.learning_rate, self.learning_rate_factor
        decay = other.weight_decay if self.weight_decay is None else self.weight_decay
        return ParamGroup(
            label=" and ".join(labels),
            learning_rate=rate,
            learning_rate_factor=factor,
            weight_decay=decay,
        )

    def to_settings(self, optim: Mapping[str, Any], is_vector: bool) -> dict[str, Any]:
        """Return the entries of a torch optimizer's group that are this group's own.

        Args:
            optim: The optimizer's settings, with ``lr`` as the peak learning rate.
        """
        own: dict[str, Any] = {IS_MATRICES: True} if self.is_matrices else {}
        if (factor := self.rate_factor(optim["lr"])) != 1.0:
            own[RATE_FACTOR] = factor
        if is_vector:
            own["weight_decay"] = 0.0
        elif self.weight_decay is not None:
            own["weight_decay"] = self.weight_decay
        return own


#: Settings of a parameter that nothing names.
DEFAULT_GROUP = ParamGroup()

GroupOf = Callable[[str], ParamGroup]
"""Plain name of a trained parameter -> its settings."""


def group_by_name(optim: OptimConfig, otherwise: GroupOf = lambda _: DEFAULT_GROUP) -> GroupOf:
    """Return the function that finds the settings of a parameter.

    The first entry of ``optim.param_groups`` counts whose pattern is found in the name.

    Args:
        otherwise: What the tuner sets for a parameter. It holds where the entry says nothing.
    """
    entries = [
        (
            re.compile(entry["pattern"]),
            ParamGroup(
                label=entry_key(index),
                learning_rate=entry.get("learning_rate"),
                weight_decay=entry.get("weight_decay"),
            ),
        )
        for index, entry in enumerate(optim.param_groups)
    ]

    def group_of(name: str) -> ParamGroup:
        for pattern, group in entries:
            if pattern.search(name):
                return group.over(otherwise(name))
        return otherwise(name)

    return group_of


def entry_key(index: int) -> str:
    """Return the dotted key of an entry."""
    return f"optim.param_groups[{index}]"


def plain_name(name: str) -> str:
    """Return a parameter's name without what peft puts around it.

    A LoRA matrix is ``model.layers.0.self_attn.q_proj.lora_A.default.weight``.
    """
    return _PEFT_INFIX.sub("", name.removeprefix(_PEFT_PREFIX))


def find_entry_problems(optim: OptimConfig) -> Iterator[str]:
    """Find entries with unknown keys or impossible values, in words that a user can act on."""
    for index, entry in enumerate(optim.param_groups):
        key = entry_key(index)
        for name in sorted(map(str, entry.keys() - _KEYS.keys())):
            yield f"{key}.{name}: an entry has {', '.join(_KEYS)}, and no {name}"
        pattern = entry.get("pattern")
        if not isinstance(pattern, str) or not pattern:
            yield f"{key}.pattern={pattern}: {_KEYS['pattern']}, such as lm_head"
        rate, decay = entry.get("learning_rate"), entry.get("weight_decay")
        if rate is not None and not (_is_number(rate) and rate > 0):
            hint = "; tuner=freeze leaves parameters as they are" if rate == 0 else ""
            yield f"{key}.learning_rate={rate}: {_KEYS['learning_rate']}{hint}"
        if decay is not None and not (_is_number(decay) and decay >= 0):
            yield f"{key}.weight_decay={decay}: {_KEYS['weight_decay']}"
        if rate is None and decay is None:
            yield f"{key} sets nothing: add learning_rate, weight_decay or both"


def _is_number(value: Any) -> bool:
    # In Python a bool is an int.
    return isinstance(value, int | float) and not isinstance(value, bool)

"""The head of a task in a model, which every tuner trains, and which gets no adapters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The modules of a model that are a task's head."""

    modules: tuple[str, ...] = ()
    """Their names; empty where the head is one of the model's trained weights."""
    peft_type: str = "CAUSAL_LM"
    """peft's ``task_type``."""


NO_HEAD = Head()


def in_modules(name: str, modules: Iterable[str]) -> bool:
    """Tell whether a parameter or a layer is in one of the modules, or is one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)

"""Check the names of ``model.config``, of which transformers ignores the unknown ones."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from llmtune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_spelling(settings: dict[str, Any], architecture: type[PretrainedConfig]) -> None:
    """Refuse a setting that is nearly one of the architecture.

    Others pass: several architectures read settings that their defaults do not list.

    Raises:
        ConfigError: With the nearest setting.
    """
    try:
        known = architecture()
    except Exception:
        # A few architectures have no defaults, such as nougat.
        return
    names = sorted({*known.to_dict(), *known.attribute_map})
    for name in settings:
        if hasattr(known, name):
            continue
        if close := difflib.get_close_matches(name, names, n=1, cutoff=0.85):
            raise ConfigError(
                f"model.config.{name}: {known.model_type} has no such setting; did you mean"
                f" {close[0]}?"
            )

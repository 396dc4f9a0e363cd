"""The settings of runs as dotted keys, and those in which runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Characters of a value in a table.
_MOST_LETTERS = 300
#: Keys for the place and the name of a run, which always differ, and groups of other verbs.
_NO_DIFFERENCE = {"run_name", "output_dir", "resume_from_checkpoint"}
_NO_TRAINING = (
    "chat.",
    "hparams_search.",
    "paths.",
    "predict.",
    "report.",
    "runs.",
    "target.",
)
_ABSENT = "not set"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested dictionaries by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def show(value: Any) -> str:
    """Write a value for a table."""
    text = "null" if value is None else str(value)
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]} ..."


def find_differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Find the keys in which configurations differ, with the value of each."""
    flat = [flatten(config) for config in configs]
    keys = sorted({key for values in flat for key in values} - _NO_DIFFERENCE)
    keys = [key for key in keys if not key.startswith(_NO_TRAINING)]
    found = {}
    for key in keys:
        shown = [show(values[key]) if key in values else _ABSENT for values in flat]
        if len(set(shown)) > 1:
            found[key] = shown
    return found

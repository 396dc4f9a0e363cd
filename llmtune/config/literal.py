"""Escape texts for OmegaConf that look like an interpolation or like a missing value."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

#: Backslashes and the beginning of an interpolation. Of the backslashes before it OmegaConf reads
#: two as one, and an odd one as its escape; everywhere else a backslash is a backslash.
_INTERPOLATION = re.compile(r"(\\*)\$\{")
#: The same, with a key that is looked up.
_LOOKUP = re.compile(r"(\\*)\$\{([\w.]+)\}")

_MISSING = "???"
#: A text of three question marks. OmegaConf cannot escape it; no command line and no YAML file can
#: hold a NUL.
_TYPED_MISSING = "\0???"


def to_literal(value: Any) -> Any:
    """Escape a nest of values so that resolving the OmegaConf node returns them unchanged."""
    return _map_texts(value, _escape)


def from_literal(value: Any) -> Any:
    """Undo :func:`to_literal` after the node was resolved."""
    return _map_texts(value, lambda text: _MISSING if text == _TYPED_MISSING else text)


def without_interpolations(text: str) -> str:
    """Escape every interpolation of a YAML text that is not escaped yet."""
    return _INTERPOLATION.sub(
        lambda match: match[0] if len(match[1]) % 2 else rf"{match[1]}\${{", text
    )


def rename_interpolations(value: Any, names: Mapping[str, str]) -> Any:
    """Let the interpolations in a nest of YAML values look up other keys.

    Args:
        names: Key that is looked up -> key to look up instead.
    """

    def rename(text: str) -> str:
        return _LOOKUP.sub(
            lambda match: (
                match[0] if len(match[1]) % 2 else f"{match[1]}${{{names.get(match[2], match[2])}}}"
            ),
            text,
        )

    return _map_texts(value, rename)


def _escape(text: str) -> str:
    if text == _MISSING:
        return _TYPED_MISSING
    return _INTERPOLATION.sub(lambda match: rf"{2 * match[1]}\${{", text)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    # Enums whose members are texts stay what they are.
    if type(value) is str:
        return change(value)
    if isinstance(value, dict):
        return {key: _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    return value

"""Text that stands for itself in OmegaConf, although it looks like an interpolation or like a
missing value.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

#: Backslashes and the beginning of an interpolation. Of the backslashes before it OmegaConf reads
#: two as one, and an odd one as its escape; everywhere else a backslash is a backslash.
_INTERPOLATION = re.compile(r"(\\*)\$\{")

_MISSING = "???"
#: A text of three question marks. OmegaConf cannot escape it; no command line and no YAML file can
#: hold a NUL.
_TYPED_MISSING = "\0???"


def to_literal(value: Any) -> Any:
    """A nest of values for an OmegaConf node whose resolution gives just these values back."""
    return _map_texts(value, _escape)


def from_literal(value: Any) -> Any:
    """What :func:`to_literal` was given, from what the node resolved to."""
    return _map_texts(value, lambda text: _MISSING if text == _TYPED_MISSING else text)


def without_interpolations(text: str) -> str:
    """A text of a YAML file for a node that shall not look anything up: what is not escaped is
    escaped.
    """
    return _INTERPOLATION.sub(
        lambda match: match[0] if len(match[1]) % 2 else rf"{match[1]}\${{", text
    )


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

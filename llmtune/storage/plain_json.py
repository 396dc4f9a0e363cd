"""JSON that somebody else wrote: whatever stands in it, reading it ends in a value of bounded depth
or in a ``ValueError``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

# : Levels of lists and objects. Python gives up at about a thousand, in whatever function goes
# through the value next.
MAX_DEPTH = 128


_DECODER = json.JSONDecoder()


class DepthError(ValueError):
    """Nested more deeply than anything that is meant."""

    def __init__(self) -> None:
        super().__init__(f"nested too deeply (more than {MAX_DEPTH} levels)")


def parse_json(
    text: str | bytes, on_object: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """As ``json.loads``.

    Args:
        on_object: Makes an object of its names and values, such as one that refuses names that
            stand twice.

    Raises:
        ValueError: It is no JSON, or :class:`DepthError`.
    """
    try:
        value = json.loads(text, object_pairs_hook=on_object)
    except RecursionError:
        raise DepthError from None
    # Of what has fewer brackets than that, nothing needs to be looked at.
    if (
        text.count(b"[") + text.count(b"{") if isinstance(text, bytes) else count_opening(text)
    ) > MAX_DEPTH:
        check_depth(value)
    return value


def decode_json(text: str, start: int, decoder: json.JSONDecoder = _DECODER) -> tuple[Any, int]:
    """The value that begins at a place of a text, and where it ends; as
    ``json.JSONDecoder.raw_decode``.

    Raises:
        ValueError: As :func:`parse_json`.
    """
    try:
        value, end = decoder.raw_decode(text, start)
    except RecursionError:
        raise DepthError from None
    if count_opening(text, start, end) > MAX_DEPTH:
        check_depth(value)
    return value, end


def count_opening(text: str, start: int = 0, end: int | None = None) -> int:
    """Brackets that open, within texts too: no fewer than levels."""
    return text.count("[", start, end) + text.count("{", start, end)


def check_depth(value: Any) -> None:
    """Go down level by level; costs a microsecond for each list and object.

    Raises:
        DepthError: A value of JSON is nested too deeply.
    """
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for holder in level
            if isinstance(holder, list | dict)
            for item in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(item, list | dict)
        ]
        if not level:
            return
    raise DepthError

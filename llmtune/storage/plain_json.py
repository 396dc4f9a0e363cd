"""Parse JSON from anybody: into a value of bounded depth, or a ``ValueError``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

#: Levels of lists and objects. At about a thousand Python raises RecursionError, in whatever
#: function walks through the value next.
MAX_DEPTH = 128

_DECODER = json.JSONDecoder()


class DepthError(ValueError):
    """JSON is nested more deeply than any that is meant to be read."""

    def __init__(self) -> None:
        super().__init__(f"nested too deeply (more than {MAX_DEPTH} levels)")


def parse_json(
    text: str | bytes, on_object: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Parse a JSON document, as ``json.loads`` does.

    Args:
        on_object: Makes an object from its names and values, for example to refuse a name that is
            there twice.

    Raises:
        ValueError: It is no JSON, or is nested too deeply (:class:`DepthError`).
    """
    try:
        value = json.loads(text, object_pairs_hook=on_object)
    except RecursionError:
        raise DepthError from None
    if isinstance(text, bytes):
        opening = text.count(b"[") + text.count(b"{")
    else:
        opening = count_opening(text)
    # Fewer brackets cannot be nested more deeply.
    if opening > MAX_DEPTH:
        check_depth(value)
    return value


def parse_lines(text: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one per line.

    A half-written line, as a crash leaves it, is passed over.
    """
    for line in text.split("\n"):
        with contextlib.suppress(ValueError):
            value = parse_json(line)
            if isinstance(value, dict):
                yield value


def decode_json(text: str, start: int, decoder: json.JSONDecoder = _DECODER) -> tuple[Any, int]:
    """Parse the value that begins at ``start``, as ``json.JSONDecoder.raw_decode`` does.

    Returns:
        The value, and the index behind it.

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
    """Count the opening brackets, those within texts too: at least as many as levels."""
    return text.count("[", start, end) + text.count("{", start, end)


def check_depth(value: Any) -> None:
    """Refuse a value that is nested too deeply; takes a microsecond per list and object.

    Raises:
        DepthError: A value of JSON is nested too deeply.
    """
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [item for container in level for item in _containers_in(container)]
        if not level:
            return
    raise DepthError


def _containers_in(value: Any) -> list[Any]:
    if not isinstance(value, list | dict):
        return []
    items = value.values() if isinstance(value, dict) else value
    return [item for item in items if isinstance(item, list | dict)]


def find_value(values: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """Find a value by its dotted key in nested mappings; the default where there is none."""
    found: Any = values
    for part in key.split("."):
        if not isinstance(found, Mapping) or found.get(part) is None:
            return default
        found = found[part]
    return found

"""Parse JSON, and refuse duplicate names in an object.

Other parsers silently drop all of them but the last.
"""

from __future__ import annotations

import json
from typing import Any

from llmtune.storage import plain_json


def refuse_duplicate_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object, as an ``object_pairs_hook``.

    Raises:
        ValueError: A name occurs twice.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for index, name in enumerate(names) if name in names[:index])
        raise ValueError(
            f"the name {duplicate!r} occurs twice in an object, of which one would be dropped"
        )
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=refuse_duplicate_names)


def parse_json(text: str | bytes) -> Any:
    """Parse a value of JSON, as all data is parsed.

    Raises:
        ValueError: It is none, is nested too deeply, or a name occurs twice in an object.
    """
    return plain_json.parse_json(text, refuse_duplicate_names)


def decode_json(text: str, start: int) -> tuple[Any, int]:
    """Parse the value that begins at a position of a text; return it, and the position of its end.

    Raises:
        ValueError: As :func:`parse_json`.
    """
    return plain_json.decode_json(text, start, _DECODER)


def describe_broken(error: json.JSONDecodeError) -> str:
    """Describe broken JSON, with the text around it."""
    near = error.doc[max(0, error.pos - 20) : error.pos + 20]
    return f"broken JSON at column {error.colno}: {error.msg}: {near!r}"

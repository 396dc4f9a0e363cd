"""Objects of JSON in which no name stands twice: parsers take the last of them and drop the others
without a word.
"""

from __future__ import annotations

import json
from typing import Any

from llmtune.storage import plain_json


def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, for ``object_pairs_hook``.

    Raises:
        ValueError: A name stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for number, name in enumerate(names) if name in names[:number])
        raise ValueError(
            f"the name {twin!r} stands twice in an object, of which one would be dropped"
        )
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=without_twins)


def parse_json(text: str | bytes) -> Any:
    """A value of JSON, as all data is parsed.

    Raises:
        ValueError: It is none, is nested too deeply, or a name stands twice in an object.
    """
    return plain_json.parse_json(text, without_twins)


def decode_json(text: str, start: int) -> tuple[Any, int]:
    """The value that begins at a place of a text, and where it ends.

    Raises:
        ValueError: As :func:`parse_json`.
    """
    return plain_json.decode_json(text, start, _DECODER)

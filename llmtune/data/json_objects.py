"""Objects of JSON in which no name stands twice: parsers take the last of them and drop the others without a word."""

from __future__ import annotations

import json
from typing import Any


def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, for ``object_pairs_hook``.

    Raises:
        ValueError: A name stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for number, name in enumerate(names) if name in names[:number])
        raise ValueError(f"the name {twin!r} stands twice in an object, of which one would be dropped")
    return found


#: Parses JSON as all data is parsed.
DECODER = json.JSONDecoder(object_pairs_hook=without_twins)


def parse_json(text: str) -> Any:
    """A value of JSON.

    Raises:
        ValueError: It is none, or a name stands twice in an object.
    """
    return DECODER.decode(text)

"""The rows that are written: the input's fields, the number of the row, and what was predicted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmtune.security.terminal import to_json_line

#: Before the name of a field of the input that has the name of a result.
_PREFIX = "input_"


def make_output_row(
    fields: Mapping[str, Any], number: int, error: str | None, result: Mapping[str, Any], key: str
) -> dict[str, Any]:
    """Make a row of the output.

    A field of the input that has the name of a result is kept under ``input_NAME``.

    Args:
        number: Of the row in the whole input, from 0.
        error: Why it was not predicted; None where it was.
        result: What the model says.
        key: The name of the result that is null where nothing was predicted.
    """
    added: dict[str, Any] = {"row": number, key: None}
    added |= result if error is None else {"error": error}
    # The same names are kept apart in every row, whether it has an error or not.
    taken = (
        {"row", "prediction", "scores", "error"} if key == "prediction" else {"row", key, "error"}
    )
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        free = name
        while free in taken or (free != name and free in fields):
            free = _PREFIX + free
        kept[free] = value
    return {**kept, **added}


def write_line(row: Mapping[str, Any]) -> str:
    """Write a row as a line of JSON; what JSON has no word for becomes text or null."""
    plain = _plain(row)
    text = to_json_line(plain, letters=True)
    try:
        text.encode()
    except UnicodeEncodeError:
        # Half a surrogate pair, which JSON can spell and UTF-8 cannot.
        text = to_json_line(plain)
    return text + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)

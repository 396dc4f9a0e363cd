"""Parse lists that a row holds as JSON text.

CSV and many exports have no other way to write a conversation into a field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmtune.data.rows.fields import prune
from llmtune.data.rows.json_objects import parse_json
from llmtune.data.rows.problems import RowError, short

#: What marks an element of a list as a message.
_SPEAKERS = ("role", "from")


def with_lists(
    row: Mapping[str, Any],
    lists: Sequence[str],
    may_be_texts: bool,
    ignored: frozenset[str] = frozenset(),
) -> Mapping[str, Any]:
    """Replace JSON text in a row by the lists, and in a list by the messages, that it describes.

    Args:
        lists: Fields that hold lists.
        may_be_texts: They are taken for lists only where all of them are lists of messages: a
            prompt may be JSON.
        ignored: Fields that messages lose, as :func:`~llmtune.data.rows.fields.without_fields` has
            it.

    Raises:
        RowError: A field that must be a list begins like one, and is no JSON.
    """
    changed: dict[str, Any] = {}
    for field in lists:
        value = row.get(field)
        if isinstance(value, str) and value.lstrip()[:1] == "[":
            changed[field] = _parse(value, field, quiet=may_be_texts)
        elif isinstance(value, list | tuple) and any(isinstance(entry, str) for entry in value):
            changed[field] = [_parse_message(entry) for entry in value]
    if may_be_texts and changed:
        both = {**row, **changed}
        if not all(_holds_messages(both.get(field)) for field in lists):
            return row
    if not changed:
        return row
    return {
        **row,
        **{
            name: prune(value, ignored) if isinstance(value, list) else value
            for name, value in changed.items()
        },
    }


def _parse(text: str, field: str, quiet: bool) -> Any:
    try:
        parsed = parse_json(text)
    except ValueError as error:
        if quiet:
            return text
        raise RowError(
            f"{field!r} is text that begins like a list, and no JSON ({error}): {short(text)};"
            " write it with json.dumps"
        ) from error
    return [_parse_message(entry) for entry in parsed] if isinstance(parsed, list) else parsed


def _parse_message(entry: Any) -> Any:
    """Parse a message of a list whose elements are JSON.

    Anything else is returned unchanged; its reader refuses it.
    """
    if not isinstance(entry, str) or entry.lstrip()[:1] != "{":
        return entry
    try:
        return parse_json(entry)
    except ValueError:
        return entry


def _holds_messages(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(
            isinstance(entry, Mapping) and any(name in entry for name in _SPEAKERS)
            for entry in value
        )
    )

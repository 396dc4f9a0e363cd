"""Read values of a row's fields: texts and lists; refuse all others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmtune.data.rows.problems import RowError, short

Row = Mapping[str, Any]


def read_list(row: Row, field: str, required: bool = True) -> list[Any]:
    """Read a list that is not empty.

    Raises:
        RowError: It is missing, or something else.
    """
    value = row.get(field)
    if value is None and not required:
        return []
    if field not in row:
        raise RowError(describe_missing(row, field))
    if not isinstance(value, list | tuple) or (required and not value):
        raise RowError(f"{field!r} must be a list with something in it, not {short(value)}")
    return list(value)


def read_text(row: Row, field: str, required: bool = True) -> str:
    """Read a text field; empty and missing are the same, because CSV knows no difference.

    Raises:
        RowError: It is missing, empty, or something else than text.
    """
    value = row.get(field)
    if value is None or value == "":
        if not required:
            return ""
        raise RowError(
            f"the field {field!r} is empty" if field in row else describe_missing(row, field)
        )
    if not isinstance(value, str):
        raise RowError(f"the field {field!r} must be text, not {short(value)}")
    if required and value.isspace():
        raise RowError(f"the field {field!r} has nothing but white space")
    if not value.isascii():
        check_unicode(value, field)
    return value


def is_blank(text: str) -> bool:
    """Tell whether a text is white space only; unlike ``strip`` this copies nothing."""
    return not text or text.isspace()


def texts_within(value: Any) -> Iterator[str]:
    """Yield every text in nested lists and mappings, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from texts_within(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_within(item)


def check_unicode(value: str, field: str) -> None:
    """Refuse what no tokenizer reads: bytes that were no UTF-8, and halves of surrogate pairs.

    JSON can hold the latter as escapes.

    Raises:
        RowError: There is one.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        # The range to which readers map a byte that they could not decode.
        if 0xDC80 <= code <= 0xDCFF:
            raise RowError(not_utf8(code - 0xDC00)) from error
        raise RowError(
            f"the field {field!r} has half a surrogate pair, \\u{code:04x}, which is no character"
        ) from error


def not_utf8(byte: int) -> str:
    """Return the message about a byte of another encoding."""
    return f"not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8"


def describe_missing(row: Row, field: str) -> str:
    """Return the message about a missing field."""
    return f"the field {field!r} is missing (the row has: {', '.join(map(str, row))})"


def rename(row: Row, fields: Mapping[str, str]) -> Row:
    """Rename the columns of a row to the names that formats know.

    Args:
        fields: Name of the format -> name in the row.
    """
    if not fields:
        return row
    missing = [name for name in fields.values() if name not in row]
    if missing:
        raise RowError(describe_missing(row, missing[0]))
    taken = set(fields.values())
    return {
        **{key: row[key] for key in row if key not in taken},
        **{key: row[name] for key, name in fields.items()},
    }

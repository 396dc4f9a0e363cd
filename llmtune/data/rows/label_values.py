"""Labels in the fields of rows: classes, numbers, and lists of them."""

from __future__ import annotations

import math
from typing import Any

from llmtune.data.rows.problems import RowError, short
from llmtune.data.rows.values import Row, check_unicode, describe_missing
from llmtune.task.labels import Label


def read_label(row: Row, field: str) -> Label:
    """Read a class, a number, or a list of either.

    Raises:
        RowError: It is missing, empty, or something else.
    """
    value = row.get(field)
    if value is None or value == "":
        raise RowError(
            f"the field {field!r} is empty" if field in row else describe_missing(row, field)
        )
    if not isinstance(value, list | tuple):
        return read_class(value, field)
    several = tuple(read_class(item, field) for item in value)
    kinds = {isinstance(item, str) for item in several}
    if len(kinds) > 1:
        raise RowError(f"the list {field!r} holds text and numbers: {short(value)}")
    if len(set(several)) < len(several) and isinstance(several[0], str):
        raise RowError(f"the list {field!r} names a class twice: {short(value)}")
    return several


def read_class(value: Any, field: str) -> str | int | float:
    """Read one class or number.

    Raises:
        RowError: It is neither.
    """
    if isinstance(value, bool):
        raise RowError(
            f"the field {field!r} must be text, a number, or a list of them, not {short(value)}:"
            " write it as text, or as 0 and 1"
        )
    if not isinstance(value, str | int | float):
        raise RowError(
            f"the field {field!r} must be text, a number, or a list of them, not {short(value)}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError(f"the field {field!r} is {value}, which no model can learn")
    if isinstance(value, str):
        if not value.strip():
            raise RowError(f"the field {field!r} has nothing but white space")
        check_unicode(value, field)
    return value

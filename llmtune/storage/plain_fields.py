"""Build dataclasses from JSON that another version, or anybody, may have written.

A value that is missing, or of another type than its field, is left out: the field then has its
default, or the empty value of its type.
"""

from __future__ import annotations

import types
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

#: The replacement of a value that its field cannot take.
_UNFIT = object()


def from_plain(cls: type[T], values: Any) -> T:
    """Build a dataclass, and those within it, from what ``json.loads`` returned.

    Args:
        values: The fields by name. Names that the class does not have are ignored; anything
            else than a dictionary counts as an empty one. A class whose files call a field by
            another name says so in ``STORED_NAMES``: field -> name in files.
    """
    stored = values if isinstance(values, dict) else {}
    names: dict[str, str] = getattr(cls, "STORED_NAMES", {})
    stored = {**stored, **{name: stored[old] for name, old in names.items() if old in stored}}
    hints = get_type_hints(cls)
    return cls(**{item.name: _read_field(item, hints, stored) for item in fields(cls)})  # type: ignore[arg-type]


def _read_field(item: Field[Any], hints: dict[str, Any], stored: dict[str, Any]) -> Any:
    if item.name in stored:
        value = _read(hints[item.name], stored[item.name])
        if value is not _UNFIT:
            return value
    if item.default is not MISSING:
        return item.default
    if item.default_factory is not MISSING:
        return item.default_factory()
    return _make_empty(hints[item.name])


def _read(hint: Any, value: Any) -> Any:
    """Return the value as its field has it, or ``_UNFIT``."""
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _read_union(get_args(hint), value)
    if origin in (list, tuple):
        return _read_sequence(origin, get_args(hint)[0], value)
    if is_dataclass(hint):
        return from_plain(hint, value) if isinstance(value, dict) else _UNFIT  # type: ignore[arg-type]
    if hint is Path:
        return Path(value) if isinstance(value, str) and value else _UNFIT
    if hint is float:
        return value if isinstance(value, int | float) and not isinstance(value, bool) else _UNFIT
    if hint is int and isinstance(value, bool):
        return _UNFIT
    return value if isinstance(value, origin or hint) else _UNFIT


def _read_union(arms: tuple[Any, ...], value: Any) -> Any:
    if value is None and type(None) in arms:
        return None
    for arm in arms:
        if arm is not type(None):
            found = _read(arm, value)
            if found is not _UNFIT:
                return found
    return _UNFIT


def _read_sequence(kind: type[Any], item: Any, values: Any) -> Any:
    """Return a list or tuple of those items that can be read."""
    if not isinstance(values, list):
        return _UNFIT
    read = (_read(item, value) for value in values)
    return kind(value for value in read if value is not _UNFIT)


def _make_empty(hint: Any) -> Any:
    if hint is Any or type(None) in get_args(hint):
        return None
    if is_dataclass(hint):
        return from_plain(hint, {})  # type: ignore[arg-type]
    return (get_origin(hint) or hint)()

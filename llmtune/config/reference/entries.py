"""List every key with its type, unit, default and documentation, read from the schema's source."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING as NO_FIELD_DEFAULT
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from omegaconf import MISSING

from llmtune.config.reference.units import UNITS
from llmtune.config.schema import Config

_ROLE = re.compile(r":\w+:`~?([^`]*)`")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyEntry:
    """One key of the configuration."""

    key: str
    """Dotted."""
    hint: Any
    """Its annotation."""
    default: Any
    """Its default; OmegaConf's ``???`` where it has none."""
    text: str
    """Its documentation, in paragraphs."""
    unit: str
    """Its unit, or an empty text."""

    @property
    def has_default(self) -> bool:
        """Tell whether the schema has a default for the key."""
        return bool(self.default != MISSING)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupEntry:
    """A group of keys, or the keys beside the groups."""

    name: str
    """Dotted; empty for the keys beside the groups."""
    text: str
    """Its documentation."""
    keys: tuple[KeyEntry, ...]
    groups: tuple[GroupEntry, ...]
    """Groups within it."""

    def all_keys(self) -> Iterator[KeyEntry]:
        """Return its keys, and those of the groups within it."""
        yield from self.keys
        for group in self.groups:
            yield from group.all_keys()


def read_entries() -> GroupEntry:
    """Read the whole schema; the source of its classes holds the documentation of the keys."""
    return _read_group(Config, "")


def clean(text: str) -> str:
    """Join the lines of each paragraph, and write roles such as ``:data:`name``` as code."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(text))
    joined = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    return _ROLE.sub(r"``\1``", joined)


def _read_group(cls: type, name: str) -> GroupEntry:
    prefix = f"{name}." if name else ""
    hints, texts = get_type_hints(cls), docstrings(cls)
    keys, groups = [], []
    for item in fields(cls):
        hint, key = hints[item.name], prefix + item.name
        if is_dataclass(hint):
            assert isinstance(hint, type)
            groups.append(_read_group(hint, key))
            continue
        if item.default_factory is not NO_FIELD_DEFAULT:
            default = item.default_factory()
        else:
            default = item.default
        keys.append(
            KeyEntry(
                key=key,
                hint=hint,
                default=default,
                text=clean(texts[item.name]),
                unit=UNITS.get(key, ""),
            )
        )
    return GroupEntry(
        name=name, text=clean(cls.__doc__ or ""), keys=tuple(keys), groups=tuple(groups)
    )


def docstrings(cls: type) -> dict[str, str]:
    """Return the text behind each field of a class."""
    (node,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(node, ast.ClassDef)
    return {
        field.target.id: text.value.value
        for field, text in zip(node.body, node.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }

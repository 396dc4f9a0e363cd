"""Look up the dotted keys of the schema, and the kinds of values that they take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from enum import Enum
from functools import cache
from typing import Any, get_origin, get_type_hints

from llmtune.config.schema import Config

#: Dictionaries that take any key.
FREE = ("model.config", "zero.deepspeed", "hparams_search.space")

#: Keys that take a file name, a mapping, or a list of both.
SOURCES = ("data.train", "data.eval", "predict.input")

#: Short or earlier name -> the key that it sets, on the command line and in YAML files.
ALIASES = {
    "run": "target.run",
    "checkpoint": "target.checkpoint",
    "checkpoint.path": "target.checkpoint",
    "base": "target.base",
    "adapter": "target.adapter",
}
#: Those of YAML files, in which ``checkpoint`` is a group.
YAML_ALIASES = {alias: key for alias, key in ALIASES.items() if alias != "checkpoint"}

#: Keys that take a word or a list of names.
NAMES = ("tuner.target_modules", "tuner.exclude_modules")

#: Prompts. Nothing in them is interpolated, not even in a YAML file: the file may be another
#: user's, and ask for variables of the environment.
PROMPTS = ("chat.prompt", "chat.system")


def known_keys() -> set[str]:
    """Return every dotted key, groups included."""
    return set(_hints())


def is_text(key: str) -> bool:
    """Tell whether the key takes only a text; ``data.train`` does not, because it may be a list."""
    return _hints().get(key) in (str, str | None)


def may_be_null(key: str) -> bool:
    """Tell whether a key that takes a text can be unset."""
    return _hints().get(key) == str | None


def takes_list(key: str) -> bool:
    """Tell whether the key takes a list of numbers."""
    return get_origin(_hints().get(key)) is list


def enum_name(key: str, text: str) -> str:
    """Return the name of the enum member with this value (``error`` for ``raise``), or the text."""
    hint = _hints().get(key)
    members = list(hint) if isinstance(hint, type) and issubclass(hint, Enum) else []
    return next((member.name for member in members if member.value == text), text)


def is_free(key: str) -> bool:
    """Tell whether the key is inside a dictionary that takes any key."""
    return key in FREE or key.startswith(tuple(f"{name}." for name in FREE))


@cache
def _hints() -> dict[str, Any]:
    return dict(_walk(Config, ""))


def _walk(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(cls).items():
        yield prefix + name, hint
        if is_dataclass(hint):
            yield from _walk(hint, f"{prefix}{name}.")  # type: ignore[arg-type]

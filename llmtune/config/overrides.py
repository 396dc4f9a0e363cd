"""Parse one override of the command line: its group or key, and its value.

A text arrives as it was typed: it has no grammar, and nothing in it is interpolated. Hydra's quotes
around the whole text are removed. Numbers, words, lists and mappings follow Hydra's grammar,
except that a comma starts no sweep.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from llmtune.config import keys
from llmtune.config.foreign import ABSENT_OPTIONS, meant_by
from llmtune.config.nearest import nearest
from llmtune.config.stored import first_line
from llmtune.errors import ConfigError

#: Groups that are off by default; every other group needs an option.
_MAY_BE_NULL = {"experiment", "debug", "hparams_search"}

#: Groups that users give the name of a file or of the hub -> the key that takes it.
_NAMED_BY = {"model": "model.name_or_path", "data": "data.train"}

#: Backslashes before a quote, or at the end of a quoted text: only there Hydra reads two as one.
_ESCAPES = re.compile(r"(\\+)(['\"]|\Z)")
_ROW_LIMIT = re.compile(r"@\d+$")
_BUILTIN = "stdlib_docs"


@dataclass(frozen=True, slots=True)
class Choice:
    """An option of a group; None removes the group."""

    group: str
    option: str | None
    text: str
    """The override for Hydra."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A value for one key."""

    key: str
    value: Any


def read_override(text: str, groups: dict[str, set[str]]) -> Choice | Setting:
    """Parse an override.

    Args:
        text: ``KEY=VALUE`` with up to two ``+`` before it, or ``~GROUP``.
        groups: Config group -> its options.

    Raises:
        ConfigError: It is no override, names something unknown, or its value cannot be read.
    """
    if text.startswith("~"):
        group = text[1:].partition("=")[0]
        if group not in groups:
            raise ConfigError(f"{text!r}: only a config group can be removed with ~")
        return Choice(group, None, text)
    name, equals, value = text.partition("=")
    typed = name.lstrip("+")
    if not equals or not typed:
        raise ConfigError(f"{text!r} is not KEY=VALUE")
    key = keys.ALIASES.get(typed, typed)
    if key in groups:
        return _read_choice(key, value, groups[key])
    known = keys.known_keys()
    if key not in known and not keys.is_free(key):
        raise ConfigError(
            f"unknown key {key!r}{meant_by(key, known | set(groups) | set(keys.ALIASES))}"
        )
    return Setting(key, _read_value(key, value))


def unquote(text: str) -> str:
    """Remove Hydra's quotes if one pair encloses the whole text.

    Within them ``\\'`` is a quote, and backslashes before a quote or at the end count in pairs; see
    https://hydra.cc/docs/advanced/override_grammar/basic/#quoted-values.
    """
    quote = text[:1]
    if len(text) < 2 or quote not in ("'", '"') or text[-1] != quote:
        return text
    inner = text[1:-1]
    for escape in _ESCAPES.finditer(inner):
        odd = len(escape[1]) % 2 == 1
        if odd and not escape[2]:
            return text
    if re.search(rf"(?<!\\)(?:\\\\)*{quote}", inner):
        return text
    return _ESCAPES.sub(lambda escape: _unescape(escape, quote), inner)


def _unescape(escape: re.Match[str], quote: str) -> str:
    # The other kind of quote needs no escape, so that backslashes before it are themselves.
    return escape[0] if escape[2] not in ("", quote) else "\\" * (len(escape[1]) // 2) + escape[2]


def _read_choice(group: str, value: str, options: set[str]) -> Choice:
    option = unquote(value.strip())
    if option in options:
        # Quoted, because Hydra takes the option 3 of zero=3 for a number and refuses it.
        return Choice(group, option, f"{group}='{option}'")
    if option == "null" and group in _MAY_BE_NULL:
        return Choice(group, None, f"{group}=null")
    if "," in option and all(part.strip() in options for part in option.split(",")):
        raise ConfigError(_describe_sweep(group, option))
    shown = None if option == "null" else option
    if (reason := ABSENT_OPTIONS.get(group, {}).get(option)) is not None:
        raise ConfigError(f"{group}={option}: there is no such option: {reason}")
    named = ""
    if shown and group in _NAMED_BY:
        named = f"; any other one is named by {_NAMED_BY[group]}={shown}"
    raise ConfigError(
        f"{group}={shown}: no such option{nearest(option, options)} ({group} has:"
        f" {', '.join(sorted(options))}){named}"
    )


def _read_value(key: str, value: str) -> Any:
    if keys.is_text(key):
        return _read_text(key, value)
    if key in keys.SOURCES:
        return _read_sources(key, value)
    if key in keys.NAMES:
        return None if value == "null" else _read_names(value)
    return _read_grammar(key, value)


def _read_names(value: str) -> list[str] | str:
    """Read one name, or a list of them with or without its brackets."""
    listed = _inside(value, "[]")
    if listed is not None:
        return [unquote(name) for name in _split(listed)]
    if "," in value:
        return [unquote(name) for name in _split(value)]
    return unquote(value)


def _read_text(key: str, value: str) -> str | None:
    if value != "null":
        return unquote(value)
    if not keys.may_be_null(key):
        raise ConfigError(
            f"{key}=null: it needs a value; the word itself is written \"{key}='null'\""
        )
    return None


def _read_sources(key: str, value: str) -> Any:
    """Read one source, or a list; a file's name may have commas and brackets."""
    if value == "null":
        return None
    if _is_file(value):
        return value
    inner = _inside(value, "[]")
    if inner is not None:
        return [_read_source(key, part) for part in _split(inner)]
    parts = _split(value)
    if len(parts) > 1 and all(
        _inside(part, "{}") is not None or _is_source(part) for part in parts
    ):
        return [_read_source(key, part) for part in parts]
    return _read_source(key, value)


def _read_source(key: str, text: str) -> Any:
    if _inside(text, "{}") is None:
        return unquote(text)
    try:
        return _read_grammar(key, text)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; a name with blanks, brackets or commas needs quotes: {{path: 'a (1).jsonl'}}"
        ) from error


def _is_source(text: str) -> bool:
    """Tell whether a part between commas is the name of a source by itself."""
    name = _ROW_LIMIT.sub("", unquote(text))
    if name == _BUILTIN or "://" in name or _is_file(name):
        return True
    pattern = Path(name).expanduser()
    try:
        return any(letter in name for letter in "*?[") and any(
            Path(pattern.anchor or ".").glob(str(pattern.relative_to(pattern.anchor)))
        )
    except (OSError, ValueError):
        return False


def _is_file(text: str) -> bool:
    """Tell whether a file or folder has this name, with or without a number of rows after it."""
    try:
        return any(
            Path(name).expanduser().exists() for name in {text, _ROW_LIMIT.sub("", text)} if name
        )
    except (OSError, ValueError, RuntimeError):
        # A name that is too long, or ~ of an unknown user.
        return False


def _inside(text: str, brackets: str) -> str | None:
    """Return the text between these brackets, where they enclose the whole; else None."""
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] + text[-1] == brackets else None


def _split(text: str) -> list[str]:
    """Split at the commas outside of quotes and brackets, without the blanks around them."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            escaped = (len(parts[-1]) - len(parts[-1].rstrip("\\"))) % 2 == 1
            quote = "" if letter == quote and not escaped else quote
        elif letter in "'\"" and not parts[-1].strip():
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth <= 0:
            parts.append("")
            continue
        parts[-1] += letter
    parts = [part.strip() for part in parts]
    # A trailing comma, and an empty list.
    return parts if parts[-1] else parts[:-1]


def _read_grammar(key: str, value: str) -> Any:
    """Read a value in Hydra's grammar: numbers, words, lists, mappings."""
    parser = OverridesParser.create()
    try:
        override = parser.parse_override(f"{key}={value}")
        if override.is_sweep_override() and keys.takes_list(key):
            override = parser.parse_override(f"{key}=[{value}]")
    except HydraException as error:
        raise ConfigError(f"{key}={value}: {first_line(error)}") from error
    if override.is_sweep_override():
        raise ConfigError(_describe_sweep(key, value))
    found = override.value()
    if not keys.is_free(key) and isinstance(found, str) and "${" in found:
        raise ConfigError(
            f"{key}={value}: nothing is interpolated on the command line; write the value itself"
        )
    return keys.enum_name(key, found) if isinstance(found, str) else found


def _describe_sweep(key: str, value: str) -> str:
    simple = re.fullmatch(r"[^()\[\]{}]+", value) is not None
    first = value.split(",")[0].strip() if simple else "VALUE"
    listed = f"; a list is written {key}=[{value}]" if simple and keys.is_free(key) else ""
    return (
        f"{key}={value}: one value, because a command is one run{listed}. Start one command per"
        f" value ({key}={first} run_name=NAME, ...), or search: python -m llmtune sweep"
        f" hparams_search.space.{key}.choices=[...]"
    )

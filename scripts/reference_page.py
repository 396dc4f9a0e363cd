"""``python -m scripts.reference_page``: write ``docs/reference.md``, every key, from the schema.

With ``--check`` nothing is written, and the exit code is 1 where the page is behind.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from llmtune.cli.reference.schema import list_variants
from llmtune.config.compose import config_groups
from llmtune.config.keys import ALIASES
from llmtune.config.reference.entries import GroupEntry, KeyEntry, read_entries
from llmtune.config.reference.json_schema import Schema, describe_value
from llmtune.config.stored import to_plain

PAGE = Path(__file__).parent.parent / "docs/reference.md"
INTRODUCTION = """# Every key

This page is made from the schema by `python -m scripts.reference_page`.
The same as JSON Schema (draft 2020-12), which an editor completes and checks YAML files with:

    python -m llmtune --schema > llmtune.schema.json

Such a file begins with these two lines:

    # @package _global_
    # yaml-language-server: $schema=llmtune.schema.json

A key is set by `group.key=value` on the command line, and by an entry of the group in a YAML file.
A file of `conf/` is chosen by `group=name`; [conf/](../conf/) shows which keys it sets.
`null` unsets a key that may be null.
A default of `-` means that a file of `conf/` or you must give a value.
Short names of keys: {aliases}.
"""
HEADER = "| key | type | unit | default | what it does |\n| --- | --- | --- | --- | --- |"
BEGIN, END = "<!-- table: python -m scripts.reference_page -->", "<!-- end of table -->"

_SIMPLE = {"string": "text", "boolean": "true or false", "null": "null", "object": "mapping"}
_SINGULAR = re.compile(r"^(text|mapping|source|list|(?:whole )?number)\b")
_SIZES = "bytes, or a text such as `80GB`"
_SOURCES = "source"


def make_page() -> str:
    """Return the whole page."""
    aliases = ", ".join(f"`{alias}=` for `{key}=`" for alias, key in ALIASES.items())
    parts = [INTRODUCTION.format(aliases=aliases)]
    root = read_entries()
    parts += _describe_group(root, "Keys beside the groups")
    for group in root.groups:
        parts += _describe_group(group, f"`{group.name}`")
    return "\n".join(parts)


def _describe_group(group: GroupEntry, title: str) -> Iterator[str]:
    yield f"## {title}\n"
    if group.name:
        yield f"{to_markdown(group.text)}\n".replace(". ", ".\n")
    options = sorted(config_groups().get(group.name, []))
    if options:
        yield BEGIN + "\n"
        yield f"Options of `{group.name}=`: {', '.join(f'`{option}`' for option in options)}.\n"
        yield END + "\n"
    rows = [_make_row(entry) for entry in _sorted_keys(group)]
    yield "\n".join([BEGIN, "", HEADER, *rows, "", END, ""])


def _sorted_keys(group: GroupEntry) -> list[KeyEntry]:
    """Return the keys of a group in the order of the schema; of the root, only its own."""
    return list(group.all_keys() if group.name else group.keys)


def _make_row(entry: KeyEntry) -> str:
    cells = [
        f"`{entry.key}`",
        to_words(describe_value(entry, list_variants())),
        entry.unit or "-",
        _show_default(entry),
        to_markdown(entry.text.replace("\n\n", " ")),
    ]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _show_default(entry: KeyEntry) -> str:
    if not entry.has_default:
        return "-"
    value = entry.default.value if isinstance(entry.default, Enum) else to_plain(entry.default)
    return f"`{_show(value)}`"


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str({None: "null", True: "true", False: "false"}[value])
    return str(value)


def to_markdown(text: str) -> str:
    """Write code of docstrings as code of Markdown."""
    return re.sub(r"``(.+?)``", r"`\1`", text)


def to_words(schema: Schema) -> str:
    """Say in words which values a schema takes."""
    if "anyOf" in schema:
        return ", or ".join(to_words(part) for part in schema["anyOf"])
    if "$ref" in schema:
        return _SIZES if schema["$ref"].endswith("size") else _SOURCES
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        # A stored configuration has another name for this one.
        words = [
            _show(word) for word in schema["enum"] if word not in ("error", False) or word == 0
        ]
        return " ".join(f"`{word}`" for word in words)
    if schema["type"] == "array":
        items = schema.get("items", {})
        return "list of " + _SINGULAR.sub(r"\1s", to_words(items))
    if schema["type"] in _SIMPLE:
        return _SIMPLE[schema["type"]]
    kind = "whole number" if schema["type"] == "integer" else "number"
    return " ".join([kind, *_show_bounds(schema)])


def _show_bounds(schema: Schema) -> Iterator[str]:
    bounds = {
        "exclusiveMinimum": "above",
        "minimum": "of at least",
        "exclusiveMaximum": "below",
        "maximum": "of at most",
    }
    words = [f"{word} {schema[name]}" for name, word in bounds.items() if name in schema]
    if words:
        yield " and ".join(words)


def main(arguments: list[str]) -> int:
    """Write the page, or compare."""
    made = make_page()
    if "--check" in arguments:
        if PAGE.read_text() != made:
            sys.stderr.write(f"{PAGE.name}: run python -m scripts.reference_page\n")
        return int(PAGE.read_text() != made)
    PAGE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

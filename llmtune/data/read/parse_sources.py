"""Parse ``data.train`` and ``data.eval`` into sources."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.config.groups.data import AUTO, DataConfig
from llmtune.data.formats.format import FORMATS
from llmtune.data.read.sources import Source, resolve_files
from llmtune.errors import ConfigError

if TYPE_CHECKING:
    pass


def parse_sources(value: Any, key: str, default_format: str) -> list[Source]:
    """Parse the sources of a config value: a text, a mapping, or a list of them.

    ``@N`` after a path is ``limit: N``.

    Raises:
        ConfigError: An unknown field or a value of the wrong kind.
    """
    if default_format != AUTO:
        FORMATS.find(default_format)
    if value is None:
        return []
    entries = value if isinstance(value, list) else [value]
    found = [
        _parse_source(entry, f"{key}[{index}]" if isinstance(value, list) else key, default_format)
        for index, entry in enumerate(entries)
    ]
    weighted = [source for source in found if source.weight is not None]
    if weighted and len(weighted) < len(found):
        unweighted = next(source.path for source in found if source.weight is None)
        raise ConfigError(
            f"{key}: {unweighted} has no weight, but other sources have one; give each of them a"
            " weight"
        )
    return found


def _parse_source(entry: Any, key: str, default_format: str) -> Source:
    if isinstance(entry, str) and entry:
        source = Source(path=entry, format=default_format)
    elif isinstance(entry, dict) and isinstance(entry.get("path"), str) and entry["path"]:
        known = {f.name for f in fields(Source)}
        if unknown := sorted(set(entry) - known):
            raise ConfigError(
                f"{key}.{unknown[0]}: unknown; a source has {', '.join(sorted(known))}"
            )
        source = Source(**{"format": default_format, **entry, **_resolve_entry(entry, key)})
    else:
        raise ConfigError(
            f"{key}={entry}: a file name, or a mapping with path, such as {{path: a.jsonl,"
            " weight: 2}"
        )
    match = re.fullmatch(r"(.+)@(\d+)", source.path)
    if match and source.limit is None and not Path(source.path).expanduser().exists():
        source = replace(source, path=match[1], limit=int(match[2]))
    return source


def _resolve_entry(entry: dict[str, Any], key: str) -> dict[str, Any]:
    """Refuse values of a mapping that have a wrong type."""
    for name, allowed in (("limit", int), ("repeat", int), ("weight", int | float)):
        value = entry.get(name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, allowed) or value <= 0
        ):
            raise ConfigError(f"{key}.{name}={value}: must be a number above 0")
    columns = entry.get("fields", {})
    if not isinstance(columns, dict) or not all(isinstance(name, str) for name in columns.values()):
        raise ConfigError(
            f"{key}.fields={columns}: a mapping such as {{instruction: question, output: answer}}"
        )
    ignore = entry.get("ignore", [])
    if not isinstance(ignore, list | tuple) or not all(isinstance(name, str) for name in ignore):
        raise ConfigError(f"{key}.ignore={ignore}: a list of fields such as [label, score]")
    if "format" in entry and entry["format"] not in (AUTO, *FORMATS.list()):
        raise ConfigError(
            f"{key}.format={entry['format']}: must be one of {', '.join((AUTO, *FORMATS.list()))}"
        )
    return {"ignore": tuple(ignore)}


def check_local_files(config: DataConfig) -> None:
    """Check that local files exist, before a model is fetched or loaded.

    Raises:
        DataError: One is not there.
    """
    for key, value in (("data.train", config.train), ("data.eval", config.eval)):
        for source in parse_sources(value, key, config.format):
            if "://" not in source.path:
                resolve_files(source)

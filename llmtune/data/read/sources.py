"""Parse ``data.train`` and ``data.eval`` into sources, and find their files."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from llmtune.config.groups.data import DataConfig
from llmtune.data.formats.format import AUTO, FORMATS
from llmtune.errors import ConfigError, DataError, MissingPrerequisiteError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

#: Sources that come with llmtune.
BUILTIN = ("stdlib_docs", "stdlib_modules")

#: Endings of files that are read, before those of compression.
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv"}
KINDS |= {".parquet": "parquet", ".arrow": "arrow"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One entry of ``data.train``."""

    path: str
    """A file, pattern, folder, URL that fsspec opens, Hugging Face id, or built-in source."""
    format: str = AUTO
    fields: dict[str, str] = field(default_factory=dict)
    """Field of the format -> column of the file."""
    ignore: tuple[str, ...] = ()
    """Fields of rows and messages to leave out, although they may say what is to be learned."""
    limit: int | None = None
    """Rows taken, drawn with the seed."""
    repeat: int = 1
    """Times that each training row is taken per epoch."""
    weight: float | None = None
    """Part of the rows of this source in the mix; the scarcest source sets its size."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    name: str | None = None
    """Configuration of a Hugging Face data set."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of a source."""

    path: str
    """Its name in error messages."""
    kind: str
    """``jsonl``, ``json``, ``csv``, ``parquet``, ``arrow``, ``builtin``, ``hub``."""


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


def resolve_files(source: Source) -> list[DataFile]:
    """List the files of a source, sorted by name.

    Raises:
        DataError: There are none, or a file's kind is not known.
    """
    if source.path in BUILTIN:
        return [DataFile(source.path, "builtin")]
    path = str(Path(source.path).expanduser()) if "://" not in source.path else source.path
    system, inner = open_system(path)
    if (
        "://" not in path
        and (Path(path) / "dataset_info.json").is_file()
        | (Path(path) / "dataset_dict.json").is_file()
    ):
        return [DataFile(path, "hub")]

    # A name that exists is no pattern, whatever letters it has.
    exists = system.exists(inner)
    if not exists and any(letter in inner for letter in "*?["):
        names = sorted(str(name) for name in system.glob(inner) if not system.isdir(name))
        if not names:
            raise DataError(
                f"{source.path}: no file matches this pattern (relative to {Path.cwd()})"
            )
    elif system.isdir(inner):
        names = sorted(str(name) for name in system.find(inner) if _kind(str(name)))
        if not names:
            raise DataError(
                f"{source.path}: no data file in this folder; there should be {_known_kinds()}"
            )
    elif exists:
        names = [inner]
    elif "://" not in path and _HUB_ID.fullmatch(path) and _kind(path) is None:
        return [DataFile(path, "hub")]
    else:
        several = "; several names are a list: data.train=[a.jsonl,b.jsonl]" if "," in path else ""
        raise DataError(
            f"{source.path}: no such file (data.train and data.eval are relative to"
            f" {Path.cwd()}){several}"
        )

    # Names as the user wrote them, each with its kind.
    prefix = "" if "://" not in path else path.split("://")[0] + "://"
    return [
        DataFile(prefix + name.removeprefix(prefix), _resolve_kind(name))
        for name in _as_given(names, path)
    ]


def open_system(path: str) -> tuple[AbstractFileSystem, str]:
    """Open the file system of a path or URL; return it, and the path in it.

    Raises:
        MissingPrerequisiteError: The protocol needs a package that is not there.
        DataError: The protocol is unknown.
    """
    from fsspec.core import url_to_fs

    try:
        system, inner = url_to_fs(path)
    except ImportError as error:
        raise MissingPrerequisiteError(f"{path}: {error}") from error
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    return system, str(inner)


def open_file(path: str) -> BinaryIO:
    """Open a file or URL, unpacked where its name says that it is packed."""
    import fsspec

    opened: Any = fsspec.open(path, "rb", compression="infer")
    if isinstance(opened, list):
        opened = opened[0]
    file: BinaryIO = opened.open()
    return file


def _as_given(names: list[str], path: str) -> list[str]:
    """Name local files as the user wrote them, not as absolute paths."""
    if "://" in path or Path(path).is_absolute():
        return names
    here = str(Path.cwd()) + "/"
    return [name.removeprefix(here) for name in names]


def is_compressed(name: str) -> bool:
    """Tell by a file's name whether it is compressed."""
    return Path(name.lower()).suffix in COMPRESSIONS


def _kind(name: str) -> str | None:
    path = Path(name.lower())
    if is_compressed(name):
        path = path.with_suffix("")
    return KINDS.get(path.suffix)


def _resolve_kind(name: str) -> str:
    kind = _kind(name)
    if kind is None:
        raise DataError(
            f"{name}: unknown kind of file; data.train takes {_known_kinds()}, or"
            f" {', '.join(BUILTIN)}"
        )
    return kind


def _known_kinds() -> str:
    return f"{', '.join(KINDS)} (each also with {', '.join(COMPRESSIONS)})"

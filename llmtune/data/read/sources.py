"""Sources of rows, and the files of each."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from llmtune.config.groups.data import AUTO
from llmtune.errors import DataError, MissingPrerequisiteError

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
            f"{source.path}: no such file (names of files are relative to {Path.cwd()}){several}"
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

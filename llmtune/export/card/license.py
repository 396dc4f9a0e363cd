"""The license of a base, as its own files name it."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from llmtune.errors import ExportError
from llmtune.security.trust import check_foreign, copy_foreign, find_objection

#: Beginning of a license's text -> the hub's name of it; the first that is found counts.
_TEXTS = (
    (r"Apache License\s+Version 2\.0", "apache-2.0"),
    (r"MIT License", "mit"),
    (r"LLAMA 2 COMMUNITY LICENSE", "llama2"),
    (r"LLAMA 3\.1 COMMUNITY LICENSE", "llama3.1"),
    (r"LLAMA 3\.2 COMMUNITY LICENSE", "llama3.2"),
    (r"LLAMA 3\.3 COMMUNITY LICENSE", "llama3.3"),
    (r"META LLAMA 3 COMMUNITY LICENSE", "llama3"),
)
_FILES = re.compile(r"(LICEN[SC]E|NOTICE|COPYING|USE_POLICY)([._-].*)?", re.IGNORECASE)
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class License:
    """The license of a base as its files state it; possibly none."""

    front_matter: dict[str, str] = field(default_factory=dict)
    """``license``, ``license_name``, ``license_link`` as the hub knows them."""
    files: tuple[Path, ...] = ()
    """License texts, which are copied beside the weights."""

    @property
    def shown(self) -> str:
        """Return the name of the license; empty where it is not known."""
        return self.front_matter.get("license_name") or self.front_matter.get("license", "")


def find_license(folders: Sequence[Path]) -> License:
    """Read the license from the front matter of the base's card, or else from its own text.

    Args:
        folders: Folders of the base; the first one that names a license counts.
    """
    files = {file.name: file for folder in reversed(folders) for file in _license_files(folder)}
    named = next((found for folder in folders if (found := _read_card(folder / "README.md"))), None)
    return License(
        named or next(filter(None, (_read_text(file) for file in files.values())), {}),
        tuple(file for _, file in sorted(files.items())),
    )


def copy_license_files(files: Sequence[Path], folder: Path) -> None:
    """Copy the texts beside the weights, as most licenses demand.

    Raises:
        ExportError: One is a link that leads out of its folder.
    """
    for file in files:
        if not (folder / file.name).exists():
            copy_foreign(file, folder / file.name, ExportError, _MOST_BYTES)


def check_licenses(folder: Path) -> None:
    """Refuse, before anything is written, what :func:`copy_license_files` would refuse.

    Raises:
        ExportError: A license file is a link that leads out of its folder.
    """
    for file in _license_files(folder):
        check_foreign(file, ExportError, _MOST_BYTES)


def _license_files(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        return
    for file in sorted(folder.iterdir()):
        if file.is_file() and _FILES.fullmatch(file.name) and file.stat().st_size <= _MOST_BYTES:
            yield file


def _read_card(file: Path) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        if find_objection(file, _MOST_BYTES) is not None:
            return {}
        match = re.match(r"---\n(.*?)\n---", file.read_text(encoding="utf-8"), re.DOTALL)
        given = yaml.safe_load(match[1]) if match else None
        if isinstance(given, dict) and isinstance(given.get("license"), str):
            keys = ("license", "license_name", "license_link")
            return {key: given[key] for key in keys if isinstance(given.get(key), str)}
    return {}


def _read_text(file: Path) -> dict[str, str]:
    if find_objection(file, _MOST_BYTES) is not None:
        return {}
    start = file.read_text(encoding="utf-8", errors="replace")[:2000]
    return next(
        ({"license": name} for pattern, name in _TEXTS if re.search(pattern, start, re.IGNORECASE)),
        {},
    )

"""Hash what shapes the tokens: file contents, tokenizer, settings.

They name the prepared rows in the cache.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.data.read.arrow_files import load_hub
from llmtune.data.read.sources import DataFile, Source, open_system
from llmtune.storage.atomic import write_cache_file
from llmtune.storage.hashing import hash_file, hash_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


#: Names under which file systems report what changes with a file's content.
_VERSION_KEYS = {
    "etag",
    "size",
    "mtime",
    "lastmodified",
    "last_modified",
    "last-modified",
    "md5hash",
    "crc32c",
    "created",
}


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash everything that shapes the ids: the tokenizer, its special tokens, its template."""
    backend: Any = tokenizer
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hash_json([backend.backend_tokenizer.to_str(), tokenizer.chat_template, special])


def hash_files(files: Sequence[DataFile], source: Source, cache: Path) -> list[list[str]]:
    """Return name and content hash of each file."""
    return [[file.path, _hash_file(file, source, cache)] for file in files]


def identify_file(file: DataFile) -> list[str]:
    """Identify a file of a stream, which is too large to be hashed, by its name and size.

    A remote file is identified by what its file system reports.
    """
    if "://" in file.path:
        return [file.path, _identify_remote(file.path)]
    path = Path(file.path)
    return [file.path, str(path.stat().st_size) if path.is_file() else ""]


def _hash_file(file: DataFile, source: Source, cache: Path) -> str:
    if file.kind == "builtin":
        return sys.version
    if file.kind == "hub":
        return str(load_hub(file.path, source)._fingerprint)
    if "://" in file.path:
        return _identify_remote(file.path)
    return hash_content(Path(file.path), cache)


def _identify_remote(url: str) -> str:
    """Return an etag, or size and times, which the file system has without reading."""
    system, inner = open_system(url)
    told = {
        key.lower(): str(value)
        for key, value in system.info(inner).items()
        if key.lower() in _VERSION_KEYS
    }
    return hash_json([told, str(system.ukey(inner))])


def hash_content(path: Path, cache: Path) -> str:
    """Hash a local file.

    The hash is remembered by size and time of change, so that only new content is read.
    """
    stat = path.stat()
    key = hash_json(
        [os.path.realpath(path), stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns]
    )
    memory = cache / "data" / "hashes" / key
    if memory.is_file() and (known := memory.read_text()):
        return known
    found = str(hash_file(path)["xxh3_128"])
    write_cache_file(memory, found)
    return found

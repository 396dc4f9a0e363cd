"""Hashes of what shapes the tokens: file contents, tokenizer, settings.

They name the prepared rows in the cache.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from llmtune.data.read.arrow_files import load_hub
from llmtune.data.read.sources import DataFile, Source, open_system

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


#: What file systems call the things that change with a file's content.
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


def digest(values: Any) -> str:
    """A short hash of plain values."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))[:24]


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything that shapes the ids: the tokenizer, its special tokens, its template."""
    backend: Any = tokenizer
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest([backend.backend_tokenizer.to_str(), tokenizer.chat_template, special])


def hash_files(files: Sequence[DataFile], source: Source, cache: Path) -> list[list[str]]:
    """Name and content hash of each file."""
    return [[file.path, _hash_file(file, source, cache)] for file in files]


def identify_file(file: DataFile) -> list[str]:
    """Name and size of a file, or what its file system says of it: for streams, which are too large
    to be hashed.
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
    """An etag, or size and times: what the file system has without reading."""
    system, inner = open_system(url)
    told = {
        key.lower(): str(value)
        for key, value in system.info(inner).items()
        if key.lower() in _VERSION_KEYS
    }
    return digest([told, str(system.ukey(inner))])


def hash_content(path: Path, cache: Path) -> str:
    """The hash of a local file, remembered by size and time of change, so that only new content is
    read.
    """
    stat = path.stat()
    key = digest(
        [os.path.realpath(path), stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns]
    )
    memory = cache / "data" / "hashes" / key
    if memory.is_file():
        return memory.read_text()
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    memory.parent.mkdir(parents=True, exist_ok=True)
    aside = memory.with_name(f"{key}.{os.getpid()}.tmp")
    aside.write_text(state.hexdigest())
    aside.rename(memory)
    return state.hexdigest()

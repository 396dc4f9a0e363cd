"""Hashes of files, streams and plain values.

xxh3 finds damage and names what is cached. SHA-256 is for what must not be forged, and where other
programs use it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import xxhash

#: Read and hashed at once.
_BLOCK_BYTES = 1 << 22


class FileHash:
    """Size in bytes and xxh3-128 of what was fed to it, as a manifest lists them."""

    def __init__(self) -> None:
        self.size = 0
        self._digest = xxhash.xxh3_128()

    def update(self, data: bytes | memoryview) -> None:
        """Feed the next bytes."""
        self._digest.update(data)
        self.size += len(data)

    @property
    def entry(self) -> dict[str, Any]:
        """Return the values of a manifest: ``size`` and ``xxh3_128``."""
        return {"size": self.size, "xxh3_128": self._digest.hexdigest()}


def hash_stream(source: BinaryIO, target: BinaryIO | None = None) -> dict[str, Any]:
    """Read a stream to its end, and copy it to ``target``; return its size and xxh3-128."""
    digest = FileHash()
    while block := source.read(_BLOCK_BYTES):
        digest.update(block)
        if target is not None:
            target.write(block)
    return digest.entry


def hash_file(path: Path) -> dict[str, Any]:
    """Read a file; return its size in bytes and xxh3-128.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        return hash_stream(file)


def hash_bytes(data: bytes) -> str:
    """Compute the xxh3-128 of bytes, in hex."""
    return xxhash.xxh3_128_hexdigest(data)


def short_hash(data: bytes) -> str:
    """Compute the xxh3-64 of bytes, in hex: for names in a cache."""
    return xxhash.xxh3_64_hexdigest(data)


def short_hash_file(path: Path) -> str:
    """Compute the xxh3-64 of a file, in hex: for names in a cache."""
    return _hash_file(path, xxhash.xxh3_64())


def hash_json(values: Any) -> str:
    """Compute a hash of plain values, of 24 hex digits; other values count as their text."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
    # Texts of users may hold halves of characters, which UTF-8 does not have.
    return hash_bytes(text.encode("utf-8", "surrogatepass"))[:24]


def sha256_bytes(data: bytes) -> str:
    """Compute the SHA-256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Compute the SHA-256 of a file, in hex.

    Raises:
        OSError: It cannot be read.
    """
    return _hash_file(path, hashlib.sha256())


def sha256_files(paths: Iterable[Path]) -> str:
    """Compute the SHA-256 of small files one behind the other, in hex: of sources of programs."""
    return sha256_bytes(b"".join(path.read_bytes() for path in paths))


def git_blob_id(path: Path) -> str:
    """Compute what git names a file's content by: the SHA-1 of a header and the bytes."""
    header = f"blob {path.stat().st_size}\0".encode()
    return _hash_file(path, hashlib.sha1(header, usedforsecurity=False))


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


def _hash_file(path: Path, digest: _Digest) -> str:
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()

"""Hashes are those that others compute of the same bytes."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest
import xxhash

from llmtune.storage import hashing
from llmtune.storage.hashing import (
    FileHash,
    git_blob_id,
    hash_bytes,
    hash_file,
    hash_json,
    hash_stream,
    sha256_bytes,
    sha256_file,
    sha256_files,
    short_hash,
    short_hash_file,
)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100])
def test_files_of_any_number_of_blocks(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "_BLOCK_BYTES", 8)
    data = bytes(range(size))
    file, copy = tmp_path / "a", io.BytesIO()
    file.write_bytes(data)
    entry = {"size": size, "xxh3_128": xxhash.xxh3_128(data).hexdigest()}
    assert hash_file(file) == hash_stream(io.BytesIO(data), copy) == entry
    assert copy.getvalue() == data
    assert hash_bytes(data) == entry["xxh3_128"]
    assert short_hash(data) == short_hash_file(file) == xxhash.xxh3_64(data).hexdigest()
    assert sha256_bytes(data) == sha256_file(file) == hashlib.sha256(data).hexdigest()
    assert sha256_files([file, file]) == hashlib.sha256(data + data).hexdigest()
    parts = FileHash()
    for byte in data:
        parts.update(bytes([byte]))
    assert parts.entry == entry


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
        (b"hello\n", "ce013625030ba8dba906f756967f9e9ca394464a"),
    ],
)
def test_git_names_a_content_so(data: bytes, name: str, tmp_path: Path) -> None:
    """The names are from ``git hash-object``."""
    (tmp_path / "a").write_bytes(data)
    assert git_blob_id(tmp_path / "a") == name


def test_plain_values_are_told_apart_and_their_order_of_keys_is_not() -> None:
    assert hash_json({"a": 1, "b": [None, 2.5]}) == hash_json({"b": [None, 2.5], "a": 1})
    texts = [{"a": 1}, {"a": "1"}, {"a": 2}, [], "", "\ud83d", "\U0001f600", None]
    assert len({hash_json(value) for value in texts}) == len(texts)
    assert hash_json([Path("x")]) == hash_json(["x"])
    assert hash_json(["x"]) == xxhash.xxh3_128(b'["x"]').hexdigest()[:24], "a name in caches"

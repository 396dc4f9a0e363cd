"""Limit how much of a file is read at a time.

Half a megabyte of gzip can unpack to half a gigabyte.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import BinaryIO, TextIO

from llmtune.data.read.sources import open_system
from llmtune.errors import DataError

#: Of one row of text. A row that is trained on has some thousand tokens; one of this size takes
#: ten times as much memory.
MAX_ROW_BYTES = 1 << 30
#: Of a packed file that is read as a whole: as much, or so many times its own size, where text
#: shrinks to a tenth.
MAX_RATIO = 100
#: The same where the size of the packed file is not known.
MAX_UNKNOWN_BYTES = 1 << 34
_CHUNK_BYTES = 1 << 26


def refuse_row(path: str, line: int) -> DataError:
    """Return the error about a row that is too long."""
    return DataError(
        f"{path}:{line}: a row of more than {MAX_ROW_BYTES >> 20} MiB; is it a file of text? One"
        " row is one line"
    )


def read_whole(path: str, stream: BinaryIO) -> bytes:
    """Read all of a file that is not read by lines.

    Raises:
        DataError: It is packed, and unpacks to far more than text does.
    """
    from fsspec.utils import infer_compression

    if infer_compression(path) is None:
        return stream.read()
    limit = _unpacked_limit(path)
    chunks, size = [], 0
    while chunk := stream.read(_CHUNK_BYTES):
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            raise DataError(
                f"{path}: unpacks to more than {limit >> 20} MiB, which no data set of its size"
                " does; if it is right, unpack it and name the unpacked file"
            )
    return b"".join(chunks)


def lines_of(path: str, text: TextIO) -> Iterator[str]:
    """Yield the lines of a text, ends included.

    Raises:
        DataError: One is too long for a row.
    """
    for index, line in enumerate(iter(lambda: text.readline(MAX_ROW_BYTES), ""), 1):
        if len(line) >= MAX_ROW_BYTES:
            raise refuse_row(path, index)
        yield line


def _unpacked_limit(path: str) -> int:
    packed = None
    with contextlib.suppress(OSError, DataError, NotImplementedError):
        system, inner = open_system(path)
        packed = system.size(inner)
    return MAX_UNKNOWN_BYTES if packed is None else max(MAX_ROW_BYTES, MAX_RATIO * int(packed))

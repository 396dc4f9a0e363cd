"""Read files in blocks of a bounded size, from any place.

Reading a file of any size takes the memory of a few blocks, and that of its longest line. The rows
of a block are parsed later (``blocks.py``), by the process that tokenizes them.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any

from llmtune.data.read.arrow_files import read_arrow, read_hub, read_parquet
from llmtune.data.read.blocks import Block, collect_blocks
from llmtune.data.read.json_files import find_rows, is_around_rows, is_whole, may_be_around_rows
from llmtune.data.read.size_bounds import MAX_ROW_BYTES, lines_of, read_whole, refuse_row
from llmtune.data.read.sources import DataFile, Source, open_file
from llmtune.data.read.stdlib_docs import read_stdlib_docs, read_stdlib_modules
from llmtune.data.rows.conversation import Conversation
from llmtune.data.rows.values import not_utf8
from llmtune.errors import DataError, MissingPrerequisiteError

#: Bytes of a block of text; some thousand rows of a chat.
BLOCK_BYTES = 1 << 20


def read_blocks(file: DataFile, source: Source, start: tuple[int, int] = (0, 1)) -> Iterator[Block]:
    """Yield the blocks of a file.

    Args:
        start: ``next`` of an earlier block, to continue after it.

    Raises:
        DataError: The file as a whole cannot be read.
    """
    reader = READERS[file.kind]
    try:
        yield from reader(file, source, start)
    except (OSError, EOFError) as error:
        # Cut or damaged compression, permissions, a network.
        raise DataError(f"{file.path}: cannot be read: {error}") from error
    except ImportError as error:
        raise MissingPrerequisiteError(f"{file.path}: {error}") from error


def _read_jsonl(file: DataFile, _source: Source, start: tuple[int, int]) -> Iterator[Block]:
    position, line = start
    with closing(open_file(file.path)) as stream:
        if position:
            # Where a packed file cannot seek, fsspec reads up to the position.
            stream.seek(position)
        # The beginning of a line whose end has not been read yet.
        rest = bytearray()
        while chunk := stream.read(BLOCK_BYTES):
            # A long line is its own block, passed on without a copy.
            if len(rest) > BLOCK_BYTES:
                head, separator, chunk = chunk.partition(b"\n")
                rest += head
                if len(rest) > MAX_ROW_BYTES:
                    raise refuse_row(file.path, line)
                if not separator:
                    continue
                position += len(rest) + 1
                block = Block(file=file.path, first=line, content=rest, next=(position, line + 1))
                rest = bytearray()
                yield block
                line += 1

            # All lines that end in this chunk are one block.
            head, separator, tail = chunk.rpartition(b"\n")
            if not separator:
                rest += chunk
                continue
            content = bytes(rest + head)
            rest = bytearray(tail)
            position += len(content) + 1
            first, line = line, line + content.count(b"\n") + 1
            yield Block(file=file.path, first=first, content=content, next=(position, line))

        # The last line may have no end.
        if rest:
            position += len(rest)
            block = Block(file=file.path, first=line, content=rest, next=(position, line + 1))
            del rest
            yield block


def _read_lines(file: DataFile, source: Source, start: tuple[int, int]) -> Iterator[Block]:
    """Read JSON lines; a file of this name may also hold a list, or objects over several lines."""
    read = _read_json if _holds_whole_json(file) else _read_jsonl
    yield from read(file, source, start)


def _holds_whole_json(file: DataFile) -> bool:
    with closing(open_file(file.path)) as stream:
        begin = stream.read(BLOCK_BYTES)
        if not may_be_around_rows(begin):
            return is_whole(begin)
        line = bytearray(begin)
        while chunk := stream.read(BLOCK_BYTES):
            head, separator, _ = chunk.partition(b"\n")
            line += head
            if separator or len(line) > MAX_ROW_BYTES:
                break
    return is_around_rows(line)


def _read_json(file: DataFile, source: Source, start: tuple[int, int]) -> Iterator[Block]:
    """Read a list of rows, an object around one, or objects over several lines.

    JSON lines under this name are recognized.
    """
    with closing(open_file(file.path)) as stream:
        data = read_whole(file.path, stream)
    if not is_whole(data) and data.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b""):
        yield from _read_jsonl(file, source, start)
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{file.path}:{line}: {not_utf8(data[error.start])}") from error
    del data
    yield from collect_blocks(file.path, find_rows(file.path, text, source), start[0])


def _read_csv(file: DataFile, _source: Source, start: tuple[int, int]) -> Iterator[Block]:
    csv.field_size_limit(MAX_ROW_BYTES)
    with closing(open_file(file.path)) as stream:
        # Bytes that are no UTF-8 stay in the row, where they are found and named.
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        delimiter = "\t" if ".tsv" in file.path.lower() else ","
        reader = csv.DictReader(lines_of(file.path, text), delimiter=delimiter, strict=True)

        def rows() -> Iterator[tuple[int, Any]]:
            try:
                line = 2
                for row in reader:
                    # line_num is that of a record's last line; the blank ones before it are passed
                    # over.
                    yield min(line, reader.line_num), row
                    line = reader.line_num + 1
            except csv.Error as error:
                raise DataError(f"{file.path}:{reader.line_num + 1}: {error}") from error

        yield from collect_blocks(file.path, rows(), start[0])


def _read_builtin(file: DataFile, _source: Source, start: tuple[int, int]) -> Iterator[Block]:
    # Each reads the sources of a part of the standard library.
    rows: Iterable[dict[str, Any]] = (
        map(_to_row, read_stdlib_docs()) if file.path == "stdlib_docs" else read_stdlib_modules()
    )
    yield from collect_blocks(file.path, enumerate(rows, 1), start[0])


def _to_row(conversation: Conversation) -> dict[str, Any]:
    return {"messages": [message.to_dict() for message in conversation.messages]}


READERS: dict[str, Callable[[DataFile, Source, tuple[int, int]], Iterator[Block]]] = {
    "jsonl": _read_lines,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "hub": read_hub,
    "builtin": _read_builtin,
}

"""Blocks of rows, as readers yield them, and the rows in them.

A block is what travels to a worker process: the bytes of some lines, or some rows as Arrow. It is
parsed by the process that tokenizes it, so that the costly parsing of JSON is shared.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtune.data.rows.json_objects import describe_broken, parse_json
from llmtune.data.rows.problems import RowError
from llmtune.data.rows.values import Row, not_utf8

if TYPE_CHECKING:
    import pyarrow as pa

#: Rows of a block of anything but text.
BLOCK_ROWS = 1000

#: Lines of JSON; a bytearray where a block is one long line.
Lines = bytes | bytearray


@dataclass(slots=True, kw_only=True)
class Block:
    """Some rows that follow each other in a file."""

    file: str
    first: int
    """Line (text) or row (anything else) of the first one, counted from 1."""
    content: Lines | pa.RecordBatch | list[tuple[int, Any]]
    """Lines of JSON; Arrow; or (line, row) where a row is an object, or the bytes of one.

    A block of a single line is empty once it has been parsed.
    """
    next: tuple[int, int] = (0, 0)
    """Position behind the block: byte (JSON lines) or row, and line."""

    @property
    def is_single_line(self) -> bool:
        """Tell whether the block is one line of JSON, as a line of many megabytes is."""
        return isinstance(self.content, Lines) and b"\n" not in self.content

    def take_content(self) -> Any:
        """Remove and return the content, so that the caller alone decides when it is freed.

        Other holders of the block would otherwise keep the bytes of a long line in memory while its
        text is rendered and tokenized.
        """
        content, self.content = self.content, b""
        return content


def parse_rows(block: Block) -> Iterator[tuple[int, Row | RowError]]:
    """Parse the rows of a block, each with its line; blank lines are left out.

    A block of a single line can be parsed once: it gives its content up.
    """
    if block.is_single_line:
        if not _is_blank(block.content):
            yield block.first, _checked(_parse_single_line(block))
        return
    for line, unparsed in _unparsed(block):
        row = _parse_line(unparsed) if isinstance(unparsed, Lines) else unparsed
        yield line, _checked(row)


def select_rows(blocks: Iterator[Block], drawn: list[int]) -> Iterator[Block]:
    """Yield blocks with only some rows, in the order drawn; these rows are held in memory.

    Args:
        drawn: Numbers of rows in the source, counted from 0.
    """
    positions = {index: position for position, index in enumerate(drawn)}
    rows = ((block.file, line, row) for block in blocks for line, row in _unparsed(block))
    kept = [(positions[index], entry) for index, entry in enumerate(rows) if index in positions]
    kept.sort(key=lambda pair: pair[0])
    for file, group in itertools.groupby((entry for _, entry in kept), key=lambda entry: entry[0]):
        yield from collect_blocks(file, ((line, row) for _, line, row in group), 0)


def count_rows(blocks: Iterator[Block]) -> int:
    """Count the rows of a source without blank lines."""
    return sum(1 for block in blocks for _ in _unparsed(block))


def collect_blocks(path: str, rows: Iterator[tuple[int, Any]], skip: int) -> Iterator[Block]:
    """Collect rows into blocks of ``BLOCK_ROWS``.

    Args:
        rows: Each with its line.
        skip: Rows at the beginning that are left out.
    """
    block: list[tuple[int, Any]] = []
    index = 0
    for index, row in enumerate(rows, 1):
        if index <= skip:
            continue
        block.append(row)
        if len(block) == BLOCK_ROWS:
            yield Block(file=path, first=block[0][0], content=block, next=(index, 0))
            block = []
    if block:
        yield Block(file=path, first=block[0][0], content=block, next=(index, 0))


def _unparsed(block: Block) -> Iterator[tuple[int, Any]]:
    """Yield rows with their lines, JSON lines still as bytes."""
    if isinstance(block.content, Lines):
        for index, line in enumerate(_split_lines(block.content), block.first):
            if not _is_blank(line):
                yield index, line
    elif isinstance(block.content, list):
        yield from block.content
    else:
        yield from enumerate(map(_without_nulls, _to_rows(block.content)), block.first)


def _split_lines(content: Lines) -> Iterator[Lines]:
    """Yield one line at a time; a line that is a whole block is not copied."""
    begin = 0
    while (end := content.find(b"\n", begin)) >= 0:
        yield content[begin:end]
        begin = end + 1
    yield content[begin:] if begin else content


def _is_blank(line: Any) -> bool:
    # Unlike strip(), isspace() makes no copy.
    return not line or line.isspace()


def _parse_single_line(block: Block) -> Any:
    """Parse a line of many megabytes with no more than two of its forms in memory at a time.

    The bytes are freed when the text is there, the text when its values are.
    """
    text = _decode_content(block)
    return _parse_text(text) if isinstance(text, str) else text


def _decode_content(block: Block) -> str | RowError:
    return _decode(block.take_content())


def _parse_line(line: Lines) -> Any:
    text = _decode(line)
    return _parse_text(text) if isinstance(text, str) else text


def _decode(line: Lines) -> str | RowError:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return RowError(not_utf8(line[error.start]))


def _parse_text(text: str) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        return RowError(describe_broken(error))
    except ValueError as error:
        # A number of thousands of digits, thousands of brackets, or a name that occurs twice.
        return RowError(f"broken JSON: {error}")


def _checked(row: Any) -> Row | RowError:
    if isinstance(row, RowError):
        return row
    if not isinstance(row, dict):
        return RowError(f"a row must be an object with named fields, not {type(row).__name__}")
    if None in row:
        return RowError("more columns than the header names")
    return row


def _to_rows(batch: pa.RecordBatch) -> list[Any]:
    """Yield the rows of a batch, or the error of each.

    pyarrow does not validate the names of fields within fields.
    """
    try:
        rows: list[Any] = batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [RowError(not_utf8(error.object[error.start]))]
        return [row for index in range(batch.num_rows) for row in _to_rows(batch.slice(index, 1))]
    return rows


def _without_nulls(row: Any) -> Any:
    """Remove the nulls that Arrow puts where one struct lacks the fields of another.

    Nulls of columns stay.
    """
    if isinstance(row, RowError):
        return row
    return {key: _pruned(value) for key, value in row.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_pruned(item) for item in value]
    return value

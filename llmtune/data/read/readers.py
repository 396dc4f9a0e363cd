"""Files read in blocks of a bounded size, from any place; what stands in a block is parsed later,
by whoever tokenizes it.

A block is what travels to a worker process: the bytes of some lines, or some rows as Arrow. So
reading a file of any size takes the memory of a few blocks, and the costly parsing of JSON is
shared among the workers.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from llmtune.data.read.json_files import describe_broken, find_rows, is_whole, may_be_around_rows
from llmtune.data.read.size_bounds import MAX_ROW_BYTES, lines_of, read_whole, refuse_row
from llmtune.data.read.sources import DataFile, Source, open_system
from llmtune.data.read.stdlib_docs import read_stdlib_docs
from llmtune.data.rows.json_objects import parse_json
from llmtune.data.rows.problems import RowError
from llmtune.data.rows.values import Row, not_utf8
from llmtune.errors import DataError, MissingPrerequisiteError

if TYPE_CHECKING:
    import pyarrow as pa

#: Bytes of a block of text; some thousand rows of a chat.
BLOCK_BYTES = 1 << 20

# : What pyarrow raises beside its own errors, for names that are no UTF-8 and lengths that no
# memory has.
_BAD_VALUES = (UnicodeError, MemoryError, OverflowError)

#: Rows of a block of anything else.
BLOCK_ROWS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some rows that follow each other in a file."""

    file: str
    first: int
    """Line (text) or row (anything else) of the first one, counted from 1."""
    content: bytes | pa.RecordBatch | list[tuple[int, Any]]
    """Lines of JSON; Arrow; or (line, row) where a row is an object, or the bytes of one."""
    next: tuple[int, int] = (0, 0)
    """Where the file goes on: byte (JSON lines) or row, and line."""


def read_blocks(file: DataFile, source: Source, start: tuple[int, int] = (0, 1)) -> Iterator[Block]:
    """The blocks of a file.

    Args:
        start: ``next`` of an earlier block, to go on behind it.

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


def parse_rows(block: Block) -> Iterator[tuple[int, Row | RowError]]:
    """The rows of a block with their lines; blank lines are none."""
    for line, unparsed in _unparsed(block):
        row = _parse_line(unparsed) if isinstance(unparsed, bytes) else unparsed
        yield line, row if isinstance(row, RowError) else _as_row(row)


def select_rows(blocks: Iterator[Block], drawn: list[int]) -> Iterator[Block]:
    """Blocks with only some rows, in the order drawn; these rows are held in memory.

    Args:
        drawn: Numbers of rows in the source, counted from 0.
    """
    places = {number: place for place, number in enumerate(drawn)}
    rows = ((block.file, line, row) for block in blocks for line, row in _unparsed(block))
    kept = [(places[number], entry) for number, entry in enumerate(rows) if number in places]
    kept.sort(key=lambda pair: pair[0])
    for file, group in itertools.groupby((entry for _, entry in kept), key=lambda entry: entry[0]):
        yield from _in_blocks(file, ((line, row) for _, line, row in group), 0)


def count_rows(blocks: Iterator[Block]) -> int:
    """Rows of a source, blank lines not counted."""
    return sum(1 for block in blocks for _ in _unparsed(block))


def _unparsed(block: Block) -> Iterator[tuple[int, Any]]:
    """Rows with their lines, JSON lines still as bytes."""
    if isinstance(block.content, bytes):
        for number, line in enumerate(_lines(block.content), block.first):
            if line.strip():
                yield number, line
    elif isinstance(block.content, list):
        yield from block.content
    else:
        yield from enumerate(map(_without_nulls, _to_rows(block.content)), block.first)


def _to_rows(batch: pa.RecordBatch) -> list[Any]:
    """The rows, or what is wrong with each: pyarrow does not validate the names of fields within
    fields.
    """
    try:
        rows: list[Any] = batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [RowError(not_utf8(error.object[error.start]))]
        return [row for number in range(batch.num_rows) for row in _to_rows(batch.slice(number, 1))]
    return rows


def _lines(content: bytes) -> Iterator[bytes]:
    """One at a time: of a long one there is no second copy where it is a block of its own."""
    begin = 0
    while (end := content.find(b"\n", begin)) >= 0:
        yield content[begin:end]
        begin = end + 1
    yield content[begin:]


def _without_nulls(row: Any) -> Any:
    """Without the nulls that Arrow puts where one struct lacks the fields of another; those of
    columns stay.
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


def _parse_line(line: bytes) -> Any:
    try:
        return parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RowError(not_utf8(line[error.start]))
    except json.JSONDecodeError as error:
        return RowError(describe_broken(error))
    except ValueError as error:
        # A number of thousands of digits, thousands of brackets, or a name that stands twice.
        return RowError(f"broken JSON: {error}")


def _as_row(row: Any) -> Row | RowError:
    if not isinstance(row, dict):
        return RowError(f"a row must be an object with named fields, not {type(row).__name__}")
    if None in row:
        return RowError("more columns than the header names")
    return row


def open_file(path: str) -> BinaryIO:
    """A file or URL, unpacked where its name says that it is packed."""
    import fsspec

    opened: Any = fsspec.open(path, "rb", compression="infer")
    if isinstance(opened, list):
        opened = opened[0]
    file: BinaryIO = opened.open()
    return file


def _read_jsonl(file: DataFile, _source: Source, start: tuple[int, int]) -> Iterator[Block]:
    position, line = start
    with closing(open_file(file.path)) as stream:
        if position:
            # Where a packed file cannot seek, fsspec reads on to the place.
            stream.seek(position)
        # Of the line that has not ended yet.
        rest = bytearray()
        while chunk := stream.read(BLOCK_BYTES):
            if len(rest) > BLOCK_BYTES:
                # A long line is a block of its own, so that no more than its parsed text is held
                # beside it.
                head, separator, chunk = chunk.partition(b"\n")
                rest += head
                if len(rest) > MAX_ROW_BYTES:
                    raise refuse_row(file.path, line)
                if not separator:
                    continue
                content = bytes(rest)
                rest.clear()
                position += len(content) + 1
                yield Block(file=file.path, first=line, content=content, next=(position, line + 1))
                line += 1
            head, separator, tail = chunk.rpartition(b"\n")
            if not separator:
                rest += chunk
                continue
            content = bytes(rest + head)
            rest = bytearray(tail)
            position += len(content) + 1
            first, line = line, line + content.count(b"\n") + 1
            yield Block(file=file.path, first=first, content=content, next=(position, line))
        if rest:
            content = bytes(rest)
            rest.clear()
            yield Block(
                file=file.path,
                first=line,
                content=content,
                next=(position + len(content), line + 1),
            )


def _read_lines(file: DataFile, source: Source, start: tuple[int, int]) -> Iterator[Block]:
    """JSON lines; a file of this name may hold a list, or objects over several lines, all the
    same.
    """
    with closing(open_file(file.path)) as stream:
        begin = stream.read(BLOCK_BYTES)
        if may_be_around_rows(begin):
            begin += stream.readline(MAX_ROW_BYTES)
    yield from (_read_json if is_whole(begin) else _read_jsonl)(file, source, start)


def _read_json(file: DataFile, source: Source, start: tuple[int, int]) -> Iterator[Block]:
    """A list of rows, an object around one, or objects over several lines; JSON lines under this
    name are told as such.
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
    yield from _in_blocks(file.path, find_rows(file.path, text, source), start[0])


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

        yield from _in_blocks(file.path, rows(), start[0])


def _read_parquet(file: DataFile, _source: Source, start: tuple[int, int]) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with closing(open_file(file.path)) as stream:
        try:
            batches = pq.ParquetFile(stream).iter_batches(batch_size=BLOCK_ROWS)
            yield from _arrow_blocks(file.path, batches, start[0])
        except (pa.ArrowException, *_BAD_VALUES) as error:
            raise DataError(
                f"{file.path}: not a Parquet file that pyarrow reads ({_reason(error)})"
            ) from error


def _read_arrow(file: DataFile, _source: Source, start: tuple[int, int]) -> Iterator[Block]:
    """Arrow's file format, or its stream format, which ``datasets`` writes."""
    import pyarrow as pa

    with closing(open_file(file.path)) as stream:
        try:
            if stream.read(6) == b"ARROW1":
                opened = pa.ipc.open_file(stream)
                batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
            else:
                stream.seek(0)
                batches = iter(pa.ipc.open_stream(stream))
            yield from _arrow_blocks(file.path, batches, start[0])
        except (pa.ArrowException, *_BAD_VALUES) as error:
            raise DataError(
                f"{file.path}: not an Arrow file that pyarrow reads ({_reason(error)})"
            ) from error


def _read_hub(file: DataFile, source: Source, start: tuple[int, int]) -> Iterator[Block]:
    import pyarrow as pa

    loaded = load_hub(file.path, source)
    try:
        if getattr(loaded, "_indices", None) is None:
            batches = iter(loaded.data.table.to_batches())
        else:
            # Rows in another order than they are stored in are copied, which reads every offset.
            for number, batch in enumerate(loaded.data.table.to_batches()):
                check_batch(batch, f"batch {number}")
            tables = loaded.with_format("arrow").iter(batch_size=BLOCK_ROWS)
            batches = (batch for table in tables for batch in table.combine_chunks().to_batches())
        yield from _arrow_blocks(file.path, batches, start[0])
    except (pa.ArrowException, *_BAD_VALUES) as error:
        raise DataError(
            f"{file.path}: not a data set that pyarrow reads ({_reason(error)})"
        ) from error


def load_hub(path: str, source: Source) -> Any:
    """A data set of the Hugging Face hub, or a folder that ``save_to_disk`` wrote.

    Raises:
        DataError: The split is not there, or the data set is no such thing.
        MissingPrerequisiteError: The hub cannot be reached.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        if "://" not in path and open_system(path)[0].isdir(path):
            loaded = datasets.load_from_disk(path)
            if isinstance(loaded, datasets.DatasetDict):
                loaded = loaded[source.split]
            return loaded
        return datasets.load_dataset(
            path, source.name, split=source.split, revision=source.revision
        )
    except ConnectionError as error:
        raise MissingPrerequisiteError(
            f"{path}: no such file here, and the Hugging Face hub cannot be reached:"
            f" {str(error).splitlines()[0]}"
        ) from error
    except (
        KeyError,
        ValueError,
        RuntimeError,
        FileNotFoundError,
        datasets.exceptions.DatasetNotFoundError,
    ) as error:
        raise DataError(f"{path}: {str(error).splitlines()[0]} (split={source.split})") from error


def _read_builtin(file: DataFile, _source: Source, start: tuple[int, int]) -> Iterator[Block]:
    rows = (
        {"messages": [message.to_dict() for message in row.messages]} for row in read_stdlib_docs()
    )
    yield from _in_blocks(file.path, enumerate(rows, 1), start[0])


def _in_blocks(path: str, rows: Iterator[tuple[int, Any]], skip: int) -> Iterator[Block]:
    block: list[tuple[int, Any]] = []
    number = 0
    for number, row in enumerate(rows, 1):
        if number <= skip:
            continue
        block.append(row)
        if len(block) == BLOCK_ROWS:
            yield Block(file=path, first=block[0][0], content=block, next=(number, 0))
            block = []
    if block:
        yield Block(file=path, first=block[0][0], content=block, next=(number, 0))


def _reason(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def check_batch(batch: pa.RecordBatch, where: str) -> None:
    """Look at every offset, index and text of a batch before anything follows them.

    Arrow trusts a file: one wrong offset ends the process, or shows other memory of it as text. A
    112 MB batch takes 6 ms.

    Raises:
        pyarrow.ArrowInvalid: With the column.
    """
    import pyarrow as pa

    batch.validate()
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        # Of numbers and dates only their values could be wrong; JavaScript writes times of day into
        # date64.
        if not pa.types.is_primitive(column.type):
            try:
                column.validate(full=True)
            except pa.ArrowInvalid as error:
                raise pa.ArrowInvalid(
                    f"{where}: the column {name!r} is damaged: {error}"
                ) from error


def _arrow_blocks(path: str, batches: Iterator[pa.RecordBatch], skip: int) -> Iterator[Block]:
    done = 0
    for whole in batches:
        if done + whole.num_rows > skip:
            check_batch(whole, f"rows {done + 1} to {done + whole.num_rows}")
        for offset in range(0, whole.num_rows, BLOCK_ROWS):
            batch = whole.slice(offset, BLOCK_ROWS)
            done += batch.num_rows
            if done <= skip or not batch.num_rows:
                continue
            yield Block(file=path, first=done - batch.num_rows + 1, content=batch, next=(done, 0))


READERS: dict[str, Callable[[DataFile, Source, tuple[int, int]], Iterator[Block]]] = {
    "jsonl": _read_lines,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "hub": _read_hub,
    "builtin": _read_builtin,
}

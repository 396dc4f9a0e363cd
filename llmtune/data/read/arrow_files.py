"""Read Arrow, Parquet and data sets of Hugging Face, validated before any offset is followed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from llmtune.data.read.blocks import BLOCK_ROWS, Block
from llmtune.data.read.sources import DataFile, Source, open_file, open_system
from llmtune.errors import DataError, MissingPrerequisiteError

if TYPE_CHECKING:
    import pyarrow as pa

#: Errors that pyarrow raises beside its own, for names that are no UTF-8 and lengths beyond any
#: memory.
_BAD_VALUES = (UnicodeError, MemoryError, OverflowError)


def read_parquet(file: DataFile, _source: Source, start: tuple[int, int]) -> Iterator[Block]:
    """Read a Parquet file.

    Raises:
        DataError: It is none, or is damaged.
    """
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


def read_arrow(file: DataFile, _source: Source, start: tuple[int, int]) -> Iterator[Block]:
    """Read Arrow's file format, or its stream format, which ``datasets`` writes.

    Raises:
        DataError: It is none, or is damaged.
    """
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


def read_hub(file: DataFile, source: Source, start: tuple[int, int]) -> Iterator[Block]:
    """Read a data set of the Hugging Face hub, or a folder that ``save_to_disk`` wrote.

    Raises:
        DataError: It is none, or is damaged.
        MissingPrerequisiteError: The hub cannot be reached.
    """
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
    """Load a data set of the Hugging Face hub, or a folder that ``save_to_disk`` wrote.

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

"""Read tokenized rows: one Arrow file per source, mapped into memory, and arrays of numbers.

:mod:`llmtune.data.store.store_writer` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.data.rows.problems import Problem, read_problem_file
from llmtune.task.labels import Label, Tags, label_from_json

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

ROWS, SUMMARY, BAD_ROWS = "rows.arrow", "summary.json", "bad_rows.jsonl"
LABELS = "row_labels.json"

#: Labels without the marks that training needs, in folders that an earlier version wrote.
_EARLIER_LABELS = "labels.json"

#: Arrays of one number per row.
COLUMNS: dict[str, type[np.generic]] = {
    "lengths": np.int32,
    "trained": np.int32,
    "hashes": np.uint64,
    "lines": np.int64,
    "files": np.int32,
    "begins": np.bool_,
}


@dataclass(slots=True, kw_only=True)
class StoreSummary:
    """Counts of one source."""

    rows: int = 0
    truncated: int = 0
    overlong: list[tuple[int, int]] = field(default_factory=list)
    """(tokens, rows of as many) that were dropped as too long; 0 tokens of uncounted long texts."""
    bad_rows: int = 0
    files: list[str] = field(default_factory=list)
    special: list[int] = field(default_factory=list)
    """Special tokens that occur in the rows."""
    unknown: list[str] = field(default_factory=list)
    """Fields that no format reads and that are not known to be harmless."""
    formats: list[str] = field(default_factory=list)
    """Formats of its files."""
    max_id: int = -1
    """The largest token id; -1 where an earlier version did not look."""

    @property
    def dropped(self) -> int:
        """Count the rows left out because they are too long."""
        return sum(count for _, count in self.overlong)


def _read_summary(file: Path) -> StoreSummary:
    # Those that an earlier version left in the cache hold counts that nothing reads.
    known = {f.name for f in fields(StoreSummary)}
    values = {name: value for name, value in json.loads(file.read_text()).items() if name in known}
    values["overlong"] = [(tokens, count) for tokens, count in values["overlong"]]
    return StoreSummary(**values)


def is_stored(folder: Path) -> bool:
    """Tell whether a folder holds the tokens of a source, with all that training needs."""
    return (folder / SUMMARY).is_file() and not (folder / _EARLIER_LABELS).is_file()


class TokenStore:
    """The rows of one source."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.summary = _read_summary(folder / SUMMARY)
        self._opened: dict[int, tuple[Any, Any, Any]] = {}

    def __len__(self) -> int:
        return self.summary.rows

    def column(self, name: str) -> NDArray[Any]:
        """Map one of the arrays ``lengths trained hashes lines files begins``. Shape (rows,)."""
        array: NDArray[Any] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return array

    def location(self, row: int) -> tuple[str, int]:
        """File and line of a row."""
        return self.summary.files[int(self.column("files")[row])], int(self.column("lines")[row])

    @cached_property
    def labels(self) -> list[Label]:
        """Labels of a source whose rows have some, row by row."""
        file = self.folder / LABELS
        if not file.is_file():
            return []
        return [label_from_json(value) for value in json.loads(file.read_text())]

    def problems(self) -> Iterator[Problem]:
        """Return the problems of rows that cannot be used."""
        return read_problem_file(self.folder / BAD_ROWS)

    @property
    def max_id(self) -> int:
        """Return the largest token id; -1 without rows."""
        if self.summary.max_id >= 0 or not len(self):
            return self.summary.max_id
        return max(int(self.read(row)[0].max(initial=-1)) for row in range(len(self)))

    def read(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Read token ids and mask of a row. Shapes: (length,)."""
        number, at = _locate(row, self._ends)
        offsets, ids, mask = self._batch(number)
        begin, end = int(offsets[at]), int(offsets[at + 1])
        return ids[begin:end], _view_bits(mask, begin, end)

    def _batch(self, number: int) -> tuple[Any, Any, Any]:
        if number not in self._opened:
            batch = self._reader.get_batch(number)
            ids, mask = batch.column(0), batch.column(1)
            self._opened[number] = (
                _view(ids.offsets, np.int32),
                _view(ids.values, np.int32),
                mask.values,
            )
        return self._opened[number]

    @cached_property
    def _reader(self) -> Any:
        import pyarrow as pa

        return pa.ipc.open_file(pa.memory_map(str(self.folder / ROWS)))

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Return the row number behind each record batch."""
        counts = [
            self._reader.get_batch(number).num_rows
            for number in range(self._reader.num_record_batches)
        ]
        return np.cumsum(counts, dtype=np.int64)


def _view(array: pa.Array, dtype: type[np.int32]) -> NDArray[np.int32]:
    """View the numbers of an Arrow array without a copy.

    Its own ``to_numpy`` imports pandas, a fifth of a second in every rank.
    """
    return np.frombuffer(array.buffers()[1], dtype)[array.offset : array.offset + len(array)]


def _view_bits(array: pa.Array, begin: int, end: int) -> NDArray[np.bool_]:
    """Unpack elements ``[begin, end)`` of an Arrow array of booleans.

    Arrow packs eight per byte, the lowest bit first.
    """
    first, last = array.offset + begin, array.offset + end
    packed = np.frombuffer(array.buffers()[1], np.uint8)[first // 8 : -(-last // 8)]
    return np.unpackbits(packed, bitorder="little")[first % 8 : first % 8 + last - first].view(
        np.bool_
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row as the model sees it. Shapes: (length,)."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    """Marked tokens: those that are trained.

    In a row with tags they are the first token of every word; in a row with another label, the
    tokens of the second text.
    """
    documents: tuple[int, ...]
    """Lengths of the documents in it, in order; one where nothing is packed."""
    label: Label | None = None

    @property
    def second(self) -> NDArray[np.bool_]:
        """Tokens of the second text of a pair. Shape (length,)."""
        if self.label is None or isinstance(self.label, Tags):
            return np.zeros_like(self.mask)
        return self.mask


def join_documents(documents: Sequence[tuple[NDArray[np.int32], NDArray[np.bool_]]]) -> Row:
    """Make the row of some documents, given as ids and mask each.

    The first token of each is not trained: the token before it is another document's.
    """
    masks = [mask.copy() for _, mask in documents]
    for mask in masks:
        mask[:1] = False
    return Row(
        ids=np.concatenate([ids for ids, _ in documents]),
        mask=np.concatenate(masks),
        documents=tuple(map(len, masks)),
    )


def _locate(number: int, ends: NDArray[np.int64]) -> tuple[int, int]:
    """Return the index of the part that holds a number, and its index in that part."""
    part = int(np.searchsorted(ends, number, side="right"))
    return part, number - (int(ends[part - 1]) if part else 0)


class Rows:
    """The rows of a split, of all its sources, in a fixed order; packed if ``starts`` is given."""

    def __init__(
        self,
        stores: Sequence[TokenStore],
        index: NDArray[np.int64],
        starts: NDArray[np.int64] | None = None,
    ):
        """
        Args:
            index: Row numbers, counted over all stores. Shape (documents,).
            starts: Where in ``index`` each packed row begins, and the end. Shape (packed rows +
                1,).
        """
        self.stores = stores
        self.index = index
        self.packed = starts is not None
        self._starts = np.arange(len(index) + 1, dtype=np.int64) if starts is None else starts
        self._ends = np.cumsum([len(store) for store in stores], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of each row. Shape (rows,)."""
        return self._sum(self.documents("lengths"))

    @cached_property
    def supervised_tokens(self) -> NDArray[np.int64]:
        """Return the number of tokens with a label of each row. Shape (rows,)."""
        return self._sum(self.documents("trained"))

    @cached_property
    def labels(self) -> list[Label]:
        """The label of each row; empty where rows have none, or not all have one."""
        if not all(store.labels for store in self.stores if len(store)):
            return []
        every = [label for store in self.stores for label in store.labels]
        return [every[document] for document in self.index.tolist()]

    def documents(self, name: str) -> NDArray[Any]:
        """Return an array's values in the order of ``index``. Shape (documents,)."""
        if not self.stores:
            return np.zeros(0, dtype=COLUMNS[name])
        every = [store.column(name) for store in self.stores]
        whole = every[0] if len(every) == 1 else np.concatenate(every)
        picked: NDArray[Any] = whole[self.index]
        return picked

    def row(self, number: int) -> Row:
        """One row."""
        if self.labels:
            ids, mask = self._read(int(self.index[number]))
            label = self.labels[number]
            return Row(ids=ids, mask=mask, documents=(len(ids),), label=label)
        begin, end = int(self._starts[number]), int(self._starts[number + 1])
        return join_documents([self._read(int(document)) for document in self.index[begin:end]])

    def location(self, document: int) -> tuple[str, int]:
        """Return file and line of a document, by its number in ``index``."""
        store, row = self._locate(int(self.index[document]))
        return store.location(row)

    def locations(self, number: int) -> list[tuple[str, int]]:
        """Return file and line of every document of a row."""
        return [
            self.location(document)
            for document in range(int(self._starts[number]), int(self._starts[number + 1]))
        ]

    def source_location(self, document: int) -> tuple[int, str, int]:
        """Return number of the store, file and line of a document."""
        store, row = self._locate(int(self.index[document]))
        return self.stores.index(store), *store.location(row)

    def first_document(self, number: int) -> int:
        """Return the number in ``index`` of the first document of a row."""
        return int(self._starts[number])

    def _read(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        store, at = self._locate(row)
        return store.read(at)

    def _locate(self, row: int) -> tuple[TokenStore, int]:
        number, at = _locate(row, self._ends)
        return self.stores[number], at

    def _sum(self, values: NDArray[Any]) -> NDArray[np.int64]:
        sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        result: NDArray[np.int64] = np.diff(sums[self._starts])
        return result

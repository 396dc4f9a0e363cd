"""The outcomes of a row of the data: one row of tokens, several, or an overflow.

A block holds the rows of many of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from llmtune.data.rows.problems import Problem, RowError
from llmtune.task.labels import Label, Tags

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """One row of tokens. Shapes: (length,)."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    """Marked tokens; ``Row`` of the token store says what is marked."""
    truncated: bool = False
    label: Label | None = None

    @property
    def supervised_tokens(self) -> int:
        """Targets of the row: trained tokens, words with a tag, or 1 where it has one label.

        The first token of a text has nothing before it to be predicted from.
        """
        if self.label is None:
            return int(np.count_nonzero(self.mask[1:]))
        return len(self.label) if isinstance(self.label, Tags) else 1


@dataclass(frozen=True, slots=True)
class TokenMask:
    """A mask of trained tokens that takes no memory per token."""

    ranges: Sequence[tuple[int, int]]
    """First token, and the one behind the last, of each range."""
    inverted: bool = False
    """True if the tokens outside the ranges are the trained ones."""

    def read(self, begin: int, end: int) -> NDArray[np.bool_]:
        """Return the mask from one token to another. Shape (end - begin,)."""
        mask = np.full(end - begin, self.inverted)
        for first, behind in self.ranges:
            mask[max(0, first - begin) : max(0, behind - begin)] = not self.inverted
        return mask


class TokenReader(Protocol):
    """Holds the ids of a text."""

    def read(self, begin: int, end: int) -> NDArray[np.int32]:
        """Return the ids from one token to another. Shape (end - begin,)."""
        ...


class SplitRows:
    """The rows of a document that was split, each read when it is asked for.

    So a document of many megabytes takes the memory of a row.
    """

    def __init__(
        self, tokens: TokenReader, mask: TokenMask, begin: int, end: int, max_seq_length: int
    ):
        """
        Args:
            begin: The document's first token.
            end: The token behind its last.
        """
        self._tokens, self._mask = tokens, mask
        # No row of one token: nothing of it could be trained.
        first = max_seq_length - 1 if (end - begin) % max_seq_length == 1 else max_seq_length
        self._begins = range(begin + first - max_seq_length, end, max_seq_length)
        self._begin, self._end = begin, end

    def __len__(self) -> int:
        return len(self._begins)

    def __iter__(self) -> Iterator[TokenRow]:
        for index in range(len(self)):
            yield self.read(index)

    def read(self, index: int) -> TokenRow:
        """Read one of the rows."""
        begin, end = self._range(index)
        return TokenRow(ids=self._tokens.read(begin, end), mask=self._mask.read(begin, end))

    def lengths(self) -> Iterator[int]:
        """Return the number of tokens of each row."""
        for index in range(len(self)):
            begin, end = self._range(index)
            yield end - begin

    def _range(self, index: int) -> tuple[int, int]:
        begin = self._begins[index]
        return max(begin, self._begin), min(begin + self._begins.step, self._end)


@dataclass(frozen=True, slots=True)
class Overflow:
    """A row that is longer than ``max_seq_length`` and was left out."""

    tokens: int
    """0 of a long text that was not tokenized to its end."""


Outcome = list[TokenRow] | SplitRows | Overflow | RowError


@dataclass(slots=True, kw_only=True)
class TokenBlock:
    """The tokens of one block. Shapes: (tokens,) for ``ids`` and ``mask``, (rows,) for the rest."""

    file: str
    position: int
    """Position of the next block in the file: byte of JSON lines, row of anything else."""
    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    lengths: NDArray[np.int32]
    trained: NDArray[np.int32]
    """Trained tokens of each row."""
    hashes: NDArray[np.uint64]
    """Hash of the ids of the whole document, to find duplicates; its pieces share it."""
    begins: NDArray[np.bool_]
    """True for each row that begins a document; pieces of a split document follow the first."""
    lines: NDArray[np.int64]
    labels: list[Label] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    overlong: list[int] = field(default_factory=list)
    """Tokens of the rows that were dropped as too long; 0 of long texts, which were not counted."""
    truncated: int = 0
    special: frozenset[int] = frozenset()
    """Special tokens that occur."""
    unknown: frozenset[str] = frozenset()
    """Fields that no format reads and that are not known to be harmless."""
    format: str = ""
    """The format of the rows."""

"""Rows of texts in columns, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

#: Letters of a cell.
_MOST_LETTERS = 40


def align(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; a long cell is cut off in its middle, where runs differ least.

    Args:
        rows: As many cells as the head has.
    """
    table = [[_cut(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[number]) for row in table) for number in range(len(head))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def _cut(cell: str) -> str:
    cell = " ".join(cell.split())
    half = _MOST_LETTERS // 2 - 2
    return cell if len(cell) <= _MOST_LETTERS else f"{cell[:half]}...{cell[-half:]}"

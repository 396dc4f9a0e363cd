"""Pack rows by best fit: several short ones share one of full length, with almost no padding.

Rows come in a seeded random order, those of more than a quarter of the length first: large ones
decide how well rows fill up (as in best-fit decreasing), and the rest stays mixed, so that a packed
row is not all rows of one length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llmtune.draws import Draw, generator

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Rows longer than this share of the capacity are placed first, longest first.
LARGE_SHARE = 0.25


def pack_rows(
    lengths: NDArray[np.int32], capacity: int, seed: int, window: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Assign rows to packed rows.

    Args:
        lengths: Tokens of each row, none above ``capacity``. Shape (rows,).
        window: Of a stream, whose windows are packed one by one.

    Returns:
        ``members``: row numbers, packed row by packed row, shape (rows,); ``starts``: where in it
        each packed row begins, and its end, shape (packed rows + 1,).
    """
    bins = _assign(
        lengths, _placing_order(lengths, capacity, generator(seed, Draw.packing, window)), capacity
    )
    members = np.argsort(bins, kind="stable").astype(np.int64)
    counts = np.bincount(bins)
    return members, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def packing_efficiency(lengths: NDArray[np.int32], packed_rows: int, capacity: int) -> float:
    """Return the share of the packed rows' positions that hold a token."""
    return float(lengths.sum(dtype=np.int64)) / (packed_rows * capacity) if packed_rows else 0.0


def _placing_order(
    lengths: NDArray[np.int32], capacity: int, draws: np.random.Generator
) -> NDArray[np.int64]:
    order = draws.permutation(len(lengths))
    large = lengths[order] > capacity * LARGE_SHARE
    first = order[large]
    return np.concatenate([first[np.argsort(-lengths[first], kind="stable")], order[~large]])


def _assign(
    lengths: NDArray[np.int32], order: NDArray[np.int64], capacity: int
) -> NDArray[np.int64]:
    """Choose the bin of each row: the open bin with the least room of those with enough (best fit).

    The bins with r tokens of room form a stack, and bit r of one integer tells whether there are
    any; so the search for the smallest sufficient room is one shift.
    """
    stacks: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    count = 0
    bins = np.empty(len(lengths), dtype=np.int64)
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            stack = stacks[room]
            chosen = stack.pop()
            if not stack:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, count
            count += 1
        left = room - length
        if left:
            stacks[left].append(chosen)
            rooms |= 1 << left
        bins[row] = chosen
    return bins

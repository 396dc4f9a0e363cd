"""Large tensors are read and computed a few rows at a time: which rows make a block."""

from __future__ import annotations

import math
from collections.abc import Iterator

# : Elements of a block: 4 MiB in fp32. The C library holds several freed pieces of a size; larger
# ones cost more memory, and no : time was won with them.
BLOCK_ELEMENTS = 1 << 20

#: Of a block, unless the tensor has no more.
_LEAST_ROWS = 16


def row_ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose elements make a block; a scalar is one row.

    A last block of a few rows would be multiplied by another kernel, which sums in another order
    than for the whole tensor. All others are of one length, so that the memory of one serves the
    next.
    """
    rows = shape[0] if shape else 1
    most = min(rows, max(2 * _LEAST_ROWS, BLOCK_ELEMENTS // max(1, math.prod(shape[1:]))))
    step = next((step for step in range(most, 0, -1) if not 0 < rows % step < _LEAST_ROWS), 1)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)

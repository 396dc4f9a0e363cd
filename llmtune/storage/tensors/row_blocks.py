"""Cut large tensors into blocks of rows, which are read and computed one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

#: Elements per block: 4 MiB in fp32. The C library keeps several freed pieces of each size, so that
#: larger blocks take more memory; they were measured to be no faster.
BLOCK_ELEMENTS = 1 << 20

#: Rows per block, unless the tensor has fewer.
_LEAST_ROWS = 16


def row_ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the first row of each block and the row behind its last; a scalar is one row.

    All blocks but the last have one length, so that one's memory serves the next. The last has no
    few rows only: the matrix kernels for those sum in another order than for the whole tensor.
    """
    rows = shape[0] if shape else 1
    most = min(rows, max(2 * _LEAST_ROWS, BLOCK_ELEMENTS // max(1, math.prod(shape[1:]))))
    step = next((step for step in range(most, 0, -1) if not 0 < rows % step < _LEAST_ROWS), 1)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)

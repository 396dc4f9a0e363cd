"""Draw the rows of an epoch, and those for evaluation: numbers only, a function of the seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmtune.data.read.sources import Source
from llmtune.draws import Draw, draw_rows
from llmtune.errors import DataError
from llmtune.units import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray


def split_eval(
    begins: NDArray[np.bool_], size: int | float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return row numbers for training, in order, and for evaluation, in the order drawn.

    Documents are drawn, each with all of its pieces: a piece between two that are trained on
    measures how much was learned by heart.

    Args:
        begins: Whether each row begins a document, or is a further piece of the one before it.
            Shape (rows,).
        size: Documents, or a share of them below 1.

    Raises:
        DataError: Nothing would be left to train on.
    """
    starts = np.flatnonzero(begins)
    documents = len(starts)
    count = size
    if not isinstance(count, int):
        count = max(1, round(size * documents)) if size else 0
    if count >= documents:
        cut = ""
        if len(begins) > documents:
            cut = f", cut into {len(begins)} pieces but held out whole"
        raise DataError(
            f"data.val_set_size={size} takes all of data.train, which has"
            f" {counted(documents, 'row')}{cut}: add rows, or take data.val_set_size=0"
        )
    drawn = draw_rows(documents, count, seed, Draw.eval_rows)
    pieces = np.diff(np.append(starts, len(begins)))[drawn]
    # The pieces of each drawn document, in order: its first row and a count from 0.
    within = np.arange(pieces.sum(), dtype=np.int64) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    eval_rows = np.repeat(starts[drawn], pieces) + within
    keep = np.ones(len(begins), dtype=bool)
    keep[eval_rows] = False
    return np.flatnonzero(keep).astype(np.int64), eval_rows


def mix(
    rows: NDArray[np.int64], sources: Sequence[Source], counts: Sequence[int], seed: int
) -> NDArray[np.int64]:
    """Return the rows of an epoch: ``repeat`` times each, or in the proportion of the weights.

    With weights, the epoch is as long as it can be without taking a row of any source more than
    ``repeat`` times; what is taken of the others is drawn.

    Args:
        rows: Numbers of the rows that may be taken, counted over all sources.
        counts: Rows of each source.

    Raises:
        DataError: A source with a weight has no rows.
    """
    ends = np.cumsum(counts)
    shares = [
        rows[(rows >= end - count) & (rows < end)] for end, count in zip(ends, counts, strict=True)
    ]
    if sources and sources[0].weight is not None:
        for source, share in zip(sources, shares, strict=True):
            if not len(share):
                raise DataError(
                    f"data.train: {source.path} has a weight, but no row that can be trained on"
                )
        total = sum(source.weight or 0 for source in sources)
        size = min(
            len(share) * source.repeat * total / (source.weight or 1)
            for share, source in zip(shares, sources, strict=True)
        )
        wanted = [int(size * (source.weight or 0) / total + 1e-9) for source in sources]
    else:
        wanted = [len(share) * source.repeat for share, source in zip(shares, sources, strict=True)]
    taken = []
    for index, (share, count) in enumerate(zip(shares, wanted, strict=True)):
        whole, rest = divmod(count, len(share)) if len(share) else (0, 0)
        drawn = np.sort(draw_rows(len(share), rest, seed, Draw.share, index))
        taken += [share] * whole + [share[drawn]]
    return np.concatenate(taken).astype(np.int64)

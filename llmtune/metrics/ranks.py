"""Values by the order of scores alone: ranks, and the area under the ROC curve."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def average_ranks(values: Tensor) -> Tensor:
    """Return the ranks of values from 1 on; equal values share the mean of theirs.

    Args:
        values: Finite. Shape (rows,).

    Returns:
        fp64, shape (rows,).
    """
    import torch

    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = last - (counts - 1) / 2
    return ranks[inverse]


def auroc(scores: Tensor, positive: Tensor) -> float | None:
    """Return the area under the ROC curve: how often a positive row's score is above a negative's.

    Ties count half (Mann and Whitney's U divided by the number of pairs, which is exact where
    torchmetrics sums a curve in fp32).

    Args:
        scores: Shape (rows,).
        positive: Boolean, shape (rows,).

    Returns:
        None where there is no positive or no negative row, or a score is not finite.
    """
    count = int(positive.sum())
    pairs = count * (len(positive) - count)
    if not pairs or not scores.isfinite().all():
        return None
    above = float(average_ranks(scores)[positive].sum()) - count * (count + 1) / 2
    return above / pairs


def macro_auroc(scores: Tensor, positive: Tensor) -> float | None:
    """Return the mean area over those columns for which there is one; None without any.

    Args:
        scores: Shape (rows, columns).
        positive: Boolean, shape (rows, columns).
    """
    areas = [
        auroc(column, flags)
        for column, flags in zip(scores.unbind(1), positive.unbind(1), strict=True)
    ]
    defined = [area for area in areas if area is not None]
    return fmean(defined) if defined else None

"""Metrics of rows with one real number each, or several."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmtune.metrics.counts import mean
from llmtune.metrics.ranks import average_ranks

if TYPE_CHECKING:
    from torch import Tensor


def regression_metrics(values: Tensor, targets: Tensor) -> dict[str, float]:
    """Return the mean squared error and the correlations; empty without rows.

    Correlations of several numbers a row are means over the numbers. One that is the same in all
    rows, as prediction or as target, has no correlation and is left out; the keys are left out
    where none remains, and where a prediction is not finite.

    Args:
        values: Predictions, any floating dtype, shape (rows,) or (rows, n).
        targets: The same shape.

    Raises:
        ValueError: The shapes differ.
    """
    if values.shape != targets.shape:
        raise ValueError(f"predictions {tuple(values.shape)}, targets {tuple(targets.shape)}")
    if not len(values) or not values.isfinite().all():
        return {}
    predicted = values.double().reshape(len(values), -1)
    true = targets.double().reshape(len(targets), -1)
    metrics = {"eval_mse": float((predicted - true).square().mean())}
    columns = [
        (left, right)
        for left, right in zip(predicted.unbind(1), true.unbind(1), strict=True)
        if not _is_constant(left) and not _is_constant(right)
    ]
    if columns:
        metrics["eval_pearson"] = _mean_correlation(columns, lambda column: column)
        # Spearman's is Pearson's of the ranks, those of equal values averaged.
        metrics["eval_spearman"] = _mean_correlation(columns, average_ranks)
    return metrics


def _is_constant(column: Tensor) -> bool:
    return bool(column.min() == column.max())


def _mean_correlation(
    columns: list[tuple[Tensor, Tensor]], transform: Callable[[Tensor], Tensor]
) -> float:
    return mean(_pearson(transform(left), transform(right)) for left, right in columns)


def _pearson(left: Tensor, right: Tensor) -> float:
    """Return Pearson's correlation of two columns that are not constant."""
    left = left - left.mean()
    right = right - right.mean()
    value = float((left / left.norm()) @ (right / right.norm()))
    # Rounding may lead beyond.
    return min(1.0, max(-1.0, value))

"""Precision, recall and F1 from counts, as scikit-learn has them with ``zero_division=0``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

#: Per class: a class's row of counts is the true one, its column the predicted one.
Matrix = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Counts:
    """The counts of each class (or label, or type of entity). Three tuples of the same length."""

    correct: tuple[int, ...]
    """Predictions of the class that are right (true positives)."""
    predicted: tuple[int, ...]
    """Predictions of the class."""
    true: tuple[int, ...]
    """Its true occurrences: the support."""

    @classmethod
    def from_matrix(cls, matrix: Matrix) -> Counts:
        """Sum up a confusion matrix of shape (true classes, predicted classes)."""
        return cls(
            correct=tuple(row[index] for index, row in enumerate(matrix)),
            predicted=tuple(sum(column) for column in zip(*matrix, strict=True)),
            true=tuple(sum(row) for row in matrix),
        )

    def precision(self) -> list[float]:
        """Return ``correct / predicted`` per class; 0 for one that was never predicted."""
        return list(map(divide, self.correct, self.predicted))

    def recall(self) -> list[float]:
        """Return ``correct / true`` per class; 0 for one that never occurs."""
        return list(map(divide, self.correct, self.true))

    def f1(self) -> list[float]:
        """Return ``2 correct / (predicted + true)`` per class; 0 for one that is in neither."""
        return [
            divide(2 * correct, predicted + true)
            for correct, predicted, true in zip(
                self.correct, self.predicted, self.true, strict=True
            )
        ]

    def total(self) -> Counts:
        """Return the sums over all classes as those of one class: what micro averages are of."""
        return Counts((sum(self.correct),), (sum(self.predicted),), (sum(self.true),))

    def present(self) -> Counts:
        """Return the counts of the classes that are true or predicted at least once."""
        rows = [
            row for row in zip(self.correct, self.predicted, self.true, strict=True) if any(row)
        ]
        correct, predicted, true = zip(*rows, strict=True) if rows else ((), (), ())
        return Counts(tuple(correct), tuple(predicted), tuple(true))


def divide(numerator: float, denominator: float) -> float:
    """Return the quotient, or 0 where the denominator is 0."""
    return numerator / denominator if denominator else 0.0


def mean(values: Iterable[float]) -> float:
    """Return the mean, or 0 where there are no values."""
    values = list(values)
    return fmean(values) if values else 0.0


def weighted_mean(values: Sequence[float], weights: Sequence[int]) -> float:
    """Return the mean with weights, or 0 where all weights are 0."""
    return divide(sum(map(float.__mul__, values, map(float, weights))), sum(weights))


def matthews(matrix: Matrix) -> float:
    """Return Matthews' correlation coefficient of a confusion matrix; 0 where it is undefined.

    For more than two classes it is Gorodkin's R_K (2004).
    """
    counts = Counts.from_matrix(matrix)
    rows = sum(counts.true)
    covariance = sum(counts.correct) * rows - _dot(counts.predicted, counts.true)
    of_predicted = rows**2 - _dot(counts.predicted, counts.predicted)
    of_true = rows**2 - _dot(counts.true, counts.true)
    return divide(covariance, math.sqrt(of_predicted) * math.sqrt(of_true))


def _dot(left: Sequence[int], right: Sequence[int]) -> int:
    return sum(map(int.__mul__, left, right))

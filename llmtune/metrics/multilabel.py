"""Metrics of rows with a set of labels each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtune.metrics.counts import Counts, mean
from llmtune.metrics.ranks import macro_auroc

if TYPE_CHECKING:
    from torch import Tensor

#: Per label: rows without it (not predicted, predicted), then rows with it (the same).
LabelCounts = tuple[tuple[tuple[int, int], tuple[int, int]], ...]


def multilabel_metrics(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Return the metrics of multi-label classification; empty without rows.

    A label is predicted where its logit is above 0 (its sigmoid above one half). The metrics equal
    scikit-learn's with ``zero_division=0``: ``eval_accuracy`` is the share of rows whose whole set
    is right, and macro averages are over all labels. A label that no row or every row has is left
    out of ``eval_auroc``, and the key is left out where no label remains.

    Args:
        logits: Any floating dtype, shape (rows, labels).
        targets: 0 or 1, shape (rows, labels).

    Raises:
        ValueError: A target is neither 0 nor 1.
    """
    if not len(targets):
        return {}
    counts = sum_label_counts(count_labels(logits, targets))
    right = ((logits > 0) == targets.bool()).all(dim=1)
    metrics = {
        "eval_accuracy": float(right.double().mean()),
        "eval_f1": mean(counts.f1()),
        "eval_f1_micro": mean(counts.total().f1()),
        "eval_precision": mean(counts.precision()),
        "eval_recall": mean(counts.recall()),
    }
    # Of the logits: the sigmoid has the same order, and more ties.
    area = macro_auroc(logits.double(), targets.bool())
    return metrics if area is None else metrics | {"eval_auroc": area}


def count_labels(logits: Tensor, targets: Tensor) -> LabelCounts:
    """Return the confusion matrix of each label: without and with it, not predicted and predicted.

    Args:
        logits: Shape (rows, labels).
        targets: 0 or 1, shape (rows, labels).

    Raises:
        ValueError: A target is neither 0 nor 1.
    """
    from torchmetrics.functional.classification import binary_confusion_matrix

    if not bool(((targets == 0) | (targets == 1)).all()):
        raise ValueError(
            f"targets from {float(targets.min())} to {float(targets.max())}, not 0 or 1"
        )
    matrices: list[tuple[tuple[int, int], tuple[int, int]]] = []
    # Label by label: torchmetrics' function for all of them refuses a single one.
    for predicted, true in zip((logits > 0).unbind(1), targets.bool().unbind(1), strict=True):
        matrix = binary_confusion_matrix(predicted.long(), true.long(), validate_args=False)
        (negative, wrong), (missed, correct) = matrix.tolist()
        matrices.append(((negative, wrong), (missed, correct)))
    return tuple(matrices)


def sum_label_counts(matrices: LabelCounts) -> Counts:
    """Return the counts behind precision, recall and F1 of each label."""
    return Counts(
        correct=tuple(correct for _, (_, correct) in matrices),
        predicted=tuple(wrong + correct for (_, wrong), (_, correct) in matrices),
        true=tuple(missed + correct for _, (missed, correct) in matrices),
    )

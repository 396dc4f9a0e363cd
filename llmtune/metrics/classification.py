"""Metrics of rows with one class each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtune.metrics.counts import Counts, divide, matthews, mean
from llmtune.metrics.ranks import auroc, macro_auroc

if TYPE_CHECKING:
    from torch import Tensor


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the metrics of single-label classification; empty without rows.

    They equal scikit-learn's with ``zero_division=0``. Macro averages are over the classes that are
    true or predicted at least once. ``eval_auroc`` is of the softmax: that of the second of two
    classes, or the mean of each class against the rest. A class that no row or every row has is
    left out of it, and the key is left out where no class remains.

    Args:
        logits: Any floating dtype, shape (rows, classes), at least two classes.
        labels: Class indices, shape (rows,).

    Raises:
        ValueError: A label is not one of the classes.
    """
    if not len(labels):
        return {}
    matrix = count_classes(logits, labels)
    present = Counts.from_matrix(matrix).present()
    accuracy = divide(sum(present.correct), sum(present.true))
    metrics = {
        "eval_accuracy": accuracy,
        "eval_f1": mean(present.f1()),
        # Each row is predicted once, so that precision, recall and F1 of the sums are this one.
        "eval_f1_micro": accuracy,
        "eval_precision": mean(present.precision()),
        "eval_recall": mean(present.recall()),
        "eval_matthews": matthews(matrix),
    }
    area = _area_under_roc(logits, labels)
    return metrics if area is None else metrics | {"eval_auroc": area}


def count_classes(logits: Tensor, labels: Tensor) -> tuple[tuple[int, ...], ...]:
    """Return the confusion matrix: how many rows of each true class got each predicted one.

    The predicted class is that of the largest logit, and the first of several.

    Args:
        logits: Shape (rows, classes).
        labels: Class indices, shape (rows,).

    Returns:
        Shape (true classes, predicted classes).

    Raises:
        ValueError: A label is not one of the classes.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    classes = logits.shape[1]
    if not bool(((labels >= 0) & (labels < classes)).all()):
        low, high = int(labels.min()), int(labels.max())
        raise ValueError(f"labels from {low} to {high}, but the classes are 0 to {classes - 1}")
    matrix = multiclass_confusion_matrix(
        logits.argmax(dim=1), labels.long(), num_classes=classes, validate_args=False
    )
    return tuple(map(tuple, matrix.tolist()))


def _area_under_roc(logits: Tensor, labels: Tensor) -> float | None:
    from torch.nn.functional import one_hot

    classes = logits.shape[1]
    shares = logits.double().softmax(dim=1)
    if classes == 2:
        return auroc(shares[:, 1], labels == 1)
    return macro_auroc(shares, one_hot(labels.long(), classes).bool())

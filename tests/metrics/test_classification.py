"""The metrics of classes equal scikit-learn's, whatever was predicted and whatever is missing."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from sklearn import metrics as sklearn_metrics
from torch import Tensor

from llmtune.metrics.classification import classification_metrics
from tests.metrics.predictions import Draws, draws


def of_sklearn(logits: Tensor, labels: Tensor) -> dict[str, float]:
    predicted = logits.argmax(dim=1).numpy()
    true = labels.numpy()
    macro = {"average": "macro", "zero_division": 0}
    with warnings.catch_warnings():
        # One class alone has no correlation: its value is 0.
        warnings.simplefilter("ignore")
        return {
            "eval_accuracy": sklearn_metrics.accuracy_score(true, predicted),
            "eval_f1": sklearn_metrics.f1_score(true, predicted, **macro),
            "eval_f1_micro": sklearn_metrics.f1_score(true, predicted, average="micro"),
            "eval_precision": sklearn_metrics.precision_score(true, predicted, **macro),
            "eval_recall": sklearn_metrics.recall_score(true, predicted, **macro),
            "eval_matthews": sklearn_metrics.matthews_corrcoef(true, predicted),
        }


def auroc_of_sklearn(logits: Tensor, labels: Tensor) -> float | None:
    shares = logits.double().softmax(dim=1).numpy()
    kinds = set(labels.tolist())
    if shares.shape[1] == 2:
        area = sklearn_metrics.roc_auc_score(labels, shares[:, 1]) if len(kinds) == 2 else None
    elif len(kinds) == shares.shape[1]:
        area = sklearn_metrics.roc_auc_score(labels, shares, multi_class="ovr", average="macro")
    else:
        # scikit-learn refuses classes without rows: those that have some, one against the rest.
        areas = [
            sklearn_metrics.roc_auc_score(labels == kind, shares[:, kind])
            for kind in kinds
            if len(kinds) > 1
        ]
        area = sum(areas) / len(areas) if areas else None
    return area


@given(drawn=draws())
@settings(max_examples=300, deadline=None)
def test_they_equal_those_of_scikit_learn(drawn: Draws) -> None:
    logits, labels = drawn.scores(), drawn.labels()
    expected = of_sklearn(logits, labels)
    area = auroc_of_sklearn(logits, labels)
    if area is not None:
        expected["eval_auroc"] = area
    metrics = classification_metrics(logits, labels)
    assert metrics == pytest.approx(expected, abs=1e-12)
    assert all(type(value) is float for value in metrics.values())


def test_a_hundred_thousand_rows_are_counted_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (100_000,), generator=generator)
    logits = torch.randn(100_000, 3, generator=generator) + torch.eye(3)[labels]
    metrics = classification_metrics(logits, labels)
    expected = of_sklearn(logits, labels)
    area = auroc_of_sklearn(logits, labels)
    assert area is not None
    assert metrics == pytest.approx(expected | {"eval_auroc": area}, abs=1e-12)


def test_absent_classes_are_in_no_average_and_predicted_ones_are() -> None:
    # Class 3 is neither true nor predicted; class 2 is predicted alone.
    logits = torch.eye(4)[[0, 1, 2, 1]]
    metrics = classification_metrics(logits, torch.tensor([0, 1, 1, 1]))
    assert metrics["eval_f1"] == pytest.approx((1 + 4 / 5 + 0) / 3)
    assert metrics["eval_recall"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_one_row_has_no_area_and_no_row_has_nothing() -> None:
    right = classification_metrics(torch.tensor([[0.0, 2.0]]), torch.tensor([1]))
    assert right == {
        "eval_accuracy": 1.0,
        "eval_f1": 1.0,
        "eval_f1_micro": 1.0,
        "eval_precision": 1.0,
        "eval_recall": 1.0,
        "eval_matthews": 0.0,
    }
    assert classification_metrics(torch.empty(0, 2), torch.empty(0, dtype=torch.long)) == {}


def test_logits_that_are_no_numbers_have_no_area() -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [1.0, 0.0]])
    metrics = classification_metrics(logits, torch.tensor([1, 0, 0]))
    assert "eval_auroc" not in metrics
    assert metrics["eval_accuracy"] == 1.0


def test_equal_logits_predict_the_first_class_and_half_an_area() -> None:
    metrics = classification_metrics(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]))
    assert metrics["eval_accuracy"] == 0.5
    assert metrics["eval_auroc"] == 0.5


@pytest.mark.parametrize("label", [2, -1, -100])
def test_a_label_that_is_no_class_is_refused(label: int) -> None:
    with pytest.raises(ValueError, match="but the classes are 0 to 1"):
        classification_metrics(torch.zeros(2, 2), torch.tensor([0, label]))

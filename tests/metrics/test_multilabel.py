"""The metrics of sets of labels equal scikit-learn's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from sklearn import metrics as sklearn_metrics
from torch import Tensor

from llmtune.metrics.multilabel import multilabel_metrics
from tests.metrics.predictions import Draws, draws


def of_sklearn(logits: Tensor, targets: Tensor) -> dict[str, float]:
    scores, true = logits.double().numpy(), targets.numpy()
    predicted = (scores > 0).astype(int)
    macro = {"average": "macro", "zero_division": 0}
    expected = {
        "eval_accuracy": sklearn_metrics.accuracy_score(true, predicted),
        "eval_f1": sklearn_metrics.f1_score(true, predicted, **macro),
        "eval_f1_micro": sklearn_metrics.f1_score(
            true, predicted, average="micro", zero_division=0
        ),
        "eval_precision": sklearn_metrics.precision_score(true, predicted, **macro),
        "eval_recall": sklearn_metrics.recall_score(true, predicted, **macro),
    }
    both = [label for label in range(true.shape[1]) if len(set(true[:, label].tolist())) == 2]
    if both:
        expected["eval_auroc"] = sklearn_metrics.roc_auc_score(
            true[:, both], scores[:, both], average="macro"
        )
    return expected


@given(drawn=draws())
@settings(max_examples=300, deadline=None)
def test_they_equal_those_of_scikit_learn(drawn: Draws) -> None:
    logits, targets = drawn.scores(), drawn.sets()
    metrics = multilabel_metrics(logits, targets)
    assert metrics == pytest.approx(of_sklearn(logits, targets), abs=1e-12)
    assert all(type(value) is float for value in metrics.values())
    # As the loss takes them.
    assert multilabel_metrics(logits, targets.float()) == metrics


def test_one_label_alone_is_a_set_too() -> None:
    metrics = multilabel_metrics(torch.tensor([[1.0], [-1.0]]), torch.tensor([[1], [0]]))
    assert set(metrics.values()) == {1.0}
    assert len(metrics) == 6


def test_a_logit_of_zero_predicts_nothing_and_empty_sets_are_right() -> None:
    metrics = multilabel_metrics(torch.zeros(2, 3), torch.zeros(2, 3))
    assert metrics["eval_accuracy"] == 1.0
    assert metrics["eval_f1"] == metrics["eval_f1_micro"] == 0.0
    assert "eval_auroc" not in metrics


def test_no_row_has_nothing() -> None:
    assert multilabel_metrics(torch.empty(0, 3), torch.empty(0, 3)) == {}


@pytest.mark.parametrize("target", [2.0, -100.0, 0.5])
def test_a_target_that_is_neither_zero_nor_one_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match="not 0 or 1"):
        multilabel_metrics(torch.zeros(2, 2), torch.tensor([[0.0, target], [1.0, 0.0]]))

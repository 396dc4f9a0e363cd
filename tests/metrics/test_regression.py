"""Errors and correlations equal scikit-learn's and scipy's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from scipy import stats
from sklearn import metrics as sklearn_metrics
from torch import Tensor

from llmtune.metrics.regression import regression_metrics
from tests.metrics.predictions import Draws, draws


def of_scipy(values: Tensor, targets: Tensor) -> dict[str, float]:
    predicted, true = values.double().numpy(), targets.double().numpy()
    expected = {"eval_mse": sklearn_metrics.mean_squared_error(true, predicted)}
    columns = [
        (left, right)
        for left, right in zip(predicted.T, true.T, strict=True)
        if len(set(left.tolist())) > 1 and len(set(right.tolist())) > 1
    ]
    for name, correlation in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        found = [correlation(left, right).statistic for left, right in columns]
        if found:
            expected[f"eval_{name}"] = sum(found) / len(found)
    return expected


@given(drawn=draws(min_columns=1, max_columns=3))
@settings(max_examples=300, deadline=None)
def test_they_equal_those_of_scipy(drawn: Draws) -> None:
    values, targets = drawn.scores(), drawn.scores()
    metrics = regression_metrics(values, targets)
    assert metrics == pytest.approx(of_scipy(values, targets), abs=1e-9)
    assert all(type(value) is float for value in metrics.values())
    if drawn.columns == 1:
        assert regression_metrics(values[:, 0], targets[:, 0]) == metrics


def test_what_agrees_has_correlations_of_one_and_not_more() -> None:
    values = torch.tensor([0.1, 0.2, 0.3, 0.7])
    assert regression_metrics(values, 3 * values + 1) == {
        "eval_mse": pytest.approx(((2 * values + 1) ** 2).mean().item()),
        "eval_pearson": pytest.approx(1),
        "eval_spearman": pytest.approx(1),
    }
    assert max(regression_metrics(values, values).values()) <= 1


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_small_and_large_numbers_correlate(size: float) -> None:
    values = torch.tensor([1.0, 2.0, 4.0]) * size
    metrics = regression_metrics(values, torch.tensor([1.0, 3.0, 2.0]))
    expected = stats.pearsonr([1, 2, 4], [1, 3, 2]).statistic
    assert metrics["eval_pearson"] == pytest.approx(expected)


def test_a_constant_leaves_the_correlations_out_of_its_column_alone() -> None:
    values = torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    targets = torch.tensor([[2.0, 1.0], [4.0, 2.0], [7.0, 3.0]])
    alone = regression_metrics(values[:, 0], targets[:, 0])
    metrics = regression_metrics(values, targets)
    assert metrics["eval_pearson"] == alone["eval_pearson"]
    assert list(regression_metrics(values[:, 1], targets[:, 1])) == ["eval_mse"]
    assert list(regression_metrics(targets[:, 1], values[:, 1])) == ["eval_mse"]


def test_one_row_has_an_error_and_no_row_has_nothing() -> None:
    assert regression_metrics(torch.tensor([1.0]), torch.tensor([3.0])) == {"eval_mse": 4.0}
    assert regression_metrics(torch.empty(0), torch.empty(0)) == {}


def test_a_prediction_that_is_no_number_leaves_all_out() -> None:
    values = torch.tensor([1.0, float("nan"), 2.0])
    assert regression_metrics(values, torch.tensor([1.0, 2.0, 3.0])) == {}


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"predictions \(3, 1\), targets \(3,\)"):
        regression_metrics(torch.zeros(3, 1), torch.zeros(3))

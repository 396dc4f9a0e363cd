"""The loss is the sum over trained tokens of what the model says about the next token."""

from __future__ import annotations

import pytest
import torch

from llmtune.task.losses import sum_cross_entropy
from tests.labels import IGNORE, targets_of


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    targets = targets_of(labels)
    return sum_cross_entropy(logits, targets), len(targets)


def test_each_position_is_judged_by_the_token_that_follows() -> None:
    torch.manual_seed(0)
    rows, length, vocabulary = 3, 7, 11
    logits, labels = (
        torch.randn(rows, length, vocabulary),
        torch.randint(vocabulary, (rows, length)),
    )
    labels[torch.rand(rows, length) < 0.4] = IGNORE
    expected, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(rows):
        for at in range(1, length):
            if labels[row, at] != IGNORE:
                expected -= logits[row, at - 1].double().log_softmax(-1)[labels[row, at]]
                count += 1
    loss, tokens = loss_of(logits, labels)
    assert tokens == count > 0
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_a_model_that_knows_the_next_token_has_no_loss() -> None:
    labels = torch.tensor([[5, 1, 2, 3]])
    logits = torch.full((1, 4, 6), -50.0)
    for at in range(3):
        logits[0, at, labels[0, at + 1]] = 50.0
    assert float(loss_of(logits, labels)[0]) == 0.0


def test_it_is_computed_in_fp32_whatever_the_logits_are() -> None:
    torch.manual_seed(1)
    logits, labels = torch.randn(2, 300, 50, dtype=torch.bfloat16), torch.randint(50, (2, 300))
    loss, _ = loss_of(logits, labels)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(loss_of(logits.double(), labels)[0]), rel=1e-6)


def test_rows_of_which_nothing_is_trained_add_nothing() -> None:
    logits = torch.randn(2, 4, 6, requires_grad=True)
    labels = torch.tensor([[1, 2, 3, 4], [IGNORE] * 4])
    loss, tokens = loss_of(logits, labels)
    alone, _ = loss_of(logits[:1], labels[:1])
    assert (tokens, float(loss)) == (3, float(alone))
    nothing, tokens = loss_of(logits, torch.full((2, 4), IGNORE))
    assert (tokens, float(nothing)) == (0, 0.0)
    nothing.backward()
    assert not logits.grad.abs().any()  # type: ignore[union-attr]

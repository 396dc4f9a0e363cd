"""The loss is the sum over trained tokens of what the model says about the next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother

from llmtune.task.labels import LabelKind, Labels, Tags
from llmtune.task.losses import sum_cross_entropy
from llmtune.task.task import TASKS, find_task
from tests.labels import IGNORE, targets_of


@dataclass(frozen=True)
class TextRow:
    """What a task reads of a row."""

    label: Any
    mask: Any = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", np.array(self.mask, dtype=bool))


@dataclass(frozen=True)
class Row:
    """Tokens, and which of them are trained."""

    ids: Any
    mask: Any


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


def test_class_weights_are_those_of_torch() -> None:
    """The summed loss divided by the weight of the targets is torch's weighted mean."""
    torch.manual_seed(2)
    names, weights = ("a", "b", "c"), (0.5, 2.0, 1.25)
    labels = Labels(kind=LabelKind.name, names=names, weights=weights)
    task = find_task("sequence_classification")
    rows = [TextRow(label) for label in "abcab"]
    logits = torch.randn(6, 3, dtype=torch.float64)
    targets = task.make_targets([*rows[:3], None, *rows[3:]], 7, labels)
    found = task.sum_losses(logits, targets, labels) / targets.weight
    judged = logits[[0, 1, 2, 4, 5]].float()
    numbers = torch.tensor([0, 1, 2, 0, 1])
    expected = torch.nn.functional.cross_entropy(judged, numbers, torch.tensor(weights))
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert task.row_weights(None, list("abcab"), labels).sum() == targets.weight


def test_sets_of_classes_are_weighed_as_torch_weighs_them() -> None:
    torch.manual_seed(3)
    weights = (0.5, 2.0, 1.25)
    labels = Labels(kind=LabelKind.names, names=("a", "b", "c"), weights=weights)
    task = find_task("sequence_classification")
    rows = [TextRow(("a", "c")), TextRow(()), TextRow(("b",))]
    logits = torch.randn(3, 3)
    targets = task.make_targets(rows, 7, labels)
    found = task.sum_losses(logits, targets, labels) / targets.weight
    sets = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, sets, pos_weight=torch.tensor(weights)
    )
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_tags_are_judged_at_the_first_token_of_each_word() -> None:
    torch.manual_seed(4)
    labels = Labels(kind=LabelKind.tags, names=("O", "B", "I"), weights=(0.1, 1.0, 3.0))
    task = find_task("token_classification")
    row = TextRow(Tags(("B", "O")), mask=[False, True, False, True, False])
    short = TextRow(Tags(("I",)), mask=[False, True, False])
    logits = torch.randn(3, 5, 3)
    targets = task.make_targets([row, None, short], 5, labels)
    own = torch.full((3, 5), IGNORE)
    own[0, 1], own[0, 3], own[2, 1] = 1, 0, 2
    found = task.sum_losses(logits, targets, labels) / targets.weight
    expected = torch.nn.functional.cross_entropy(
        logits.view(-1, 3), own.view(-1), torch.tensor(labels.weights)
    )
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    observed = task.observe(logits, targets)
    assert observed["words"].tolist() == [2, 0, 1]


@pytest.mark.parametrize("name", ["sequence_classification", "token_classification", "regression"])
def test_a_batch_without_rows_has_no_loss_and_keeps_its_gradient(name: str) -> None:
    task = find_task(name)
    labels = task.default_labels
    logits = torch.randn(2, 4, len(labels.names), requires_grad=True)
    if task.judges_rows:
        logits = torch.randn(2, len(labels.names), requires_grad=True)
    targets = task.make_targets([None, None], 4, labels)
    loss = task.sum_losses(logits, targets, labels)
    assert (float(loss.detach()), targets.weight, len(targets)) == (0.0, 0.0, 0)
    loss.backward()
    assert not logits.grad.abs().any()  # type: ignore[union-attr]
    assert all(len(rows) in (0, 2) for rows in task.observe(logits, targets).values())


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 0.97])
def test_smoothed_tokens_are_those_of_transformers(smoothing: float) -> None:
    """transformers' LabelSmoother takes the mean over the trained tokens."""
    task = find_task("causal_lm")
    for seed in range(5):
        torch.manual_seed(seed)
        rows, length, vocabulary = 3, 9, 11 + seed
        logits = torch.randn(rows, length, vocabulary) * 3
        ids = torch.randint(vocabulary, (rows, length))
        mask = torch.rand(rows, length) < 0.6
        targets = task.make_targets(
            [Row(ids=i.numpy(), mask=m.numpy()) for i, m in zip(ids, mask, strict=True)],
            length,
            Labels(),
        )
        found = task.sum_smoothed_losses(logits, targets, Labels(), smoothing) / targets.weight
        wanted = LabelSmoother(epsilon=smoothing)(
            {"logits": logits}, ids.masked_fill(~mask, IGNORE), shift_labels=True
        )
        assert float(found) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("name", ["sequence_classification", "token_classification"])
@pytest.mark.parametrize("weights", [(), (0.5, 2.0, 1.25)])
def test_smoothed_classes_are_those_of_torch(name: str, weights: tuple[float, ...]) -> None:
    torch.manual_seed(5)
    task = find_task(name)
    kind = task.label_kinds[0]
    labels = Labels(kind=kind, names=("a", "b", "c"), weights=weights)
    numbers = torch.tensor([2, 0, 1, 1])
    if task.judges_rows:
        rows = [TextRow("abc"[number]) for number in numbers]
        logits = torch.randn(4, 3)
    else:
        rows = [TextRow(Tags(("c", "a", "b", "b")), mask=[True] * 4)]
        logits = torch.randn(1, 4, 3)
    targets = task.make_targets(rows, 4, labels)
    found = task.sum_smoothed_losses(logits, targets, labels, 0.2) / targets.weight
    expected = torch.nn.functional.cross_entropy(
        logits.view(-1, 3),
        numbers,
        torch.tensor(weights) if weights else None,
        label_smoothing=0.2,
    )
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_labels_without_a_target_to_smooth_are_named_by_their_task() -> None:
    smoothed = {task.name: task.smoothed_kinds for task in TASKS.list().values()}
    assert smoothed["regression"] == ()
    assert smoothed["sequence_classification"] == (LabelKind.name,)

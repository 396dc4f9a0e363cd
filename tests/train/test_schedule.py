"""The learning rate over the steps."""

from __future__ import annotations

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from llmtune.train.hooks.samples import samples_reason_to_skip
from llmtune.train.schedule import SCHEDULES, learning_rate_at


def curve(kind: str, total: int = 20, warmup: int = 4) -> list[float]:
    return [learning_rate_at(step, total, warmup, 1.0, kind) for step in range(total)]


@pytest.mark.parametrize("kind", list(SCHEDULES.list()))
def test_warm_up_rises_to_the_peak_and_never_starts_at_zero(kind: str) -> None:
    rates = curve(kind)
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert learning_rate_at(0, 20, 0, 1.0, kind) == 1.0


@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        ("cosine", get_cosine_schedule_with_warmup),
        ("linear", get_linear_schedule_with_warmup),
    ],
)
def test_decay_is_that_of_transformers(kind: str, reference: object) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = reference(optimizer, 4, 20)  # type: ignore[operator]
    expected = []
    for _ in range(20):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert curve(kind)[4:] == pytest.approx(expected[4:])


def test_constant_stays() -> None:
    assert set(curve("constant")[4:]) == {1.0}


def test_samples_are_skipped_where_they_would_gather_a_large_model() -> None:
    assert samples_reason_to_skip("auto", 10**8, True, 3) is None
    assert samples_reason_to_skip("auto", 10**10, False, 3) is None
    assert "gather" in str(samples_reason_to_skip("auto", 10**10, True, 3))
    assert samples_reason_to_skip(True, 10**10, True, 3) is None
    assert samples_reason_to_skip(False, 10, False, 3) is not None
    assert samples_reason_to_skip("auto", 10, False, 0) is not None

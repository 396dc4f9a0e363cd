"""When evaluations and checkpoints come: every so many steps, or at the step that ends an epoch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.config.groups.schedule import ScheduleConfig
from llmtune.config.groups.train import TrainConfig
from llmtune.plan.length.resolve_steps import resolve_steps
from llmtune.plan.steps import Interval, StepsPlan, evaluation_interval, save_interval


def plan_of(rows: int, size: int, epochs: float = 1.0, max_steps: int | None = None) -> StepsPlan:
    train = TrainConfig(num_train_epochs=epochs, max_steps=max_steps)
    return resolve_steps(train, ScheduleConfig(warmup_steps=0), rows, size)


def due(interval: Interval) -> list[int]:
    return [step for step in range(1, 1000) if interval.is_due(step)]


def test_an_epoch_ends_with_the_step_whose_batch_crosses_its_border() -> None:
    train = TrainConfig(eval_strategy="epoch")
    # 43 rows, 8 per step: row 43 is in step 6, row 86 in step 11, row 129 in step 17, the last.
    assert due(evaluation_interval(train, plan_of(43, 8, epochs=3))) == [6, 11]
    assert due(evaluation_interval(train, plan_of(40, 8, epochs=3))) == [5, 10]
    assert due(evaluation_interval(train, plan_of(40, 8, max_steps=12))) == [5, 10]
    # A step of several epochs ends them all.
    assert due(evaluation_interval(train, plan_of(3, 8, max_steps=4))) == [1, 2, 3]


@given(
    rows=st.integers(1, 60),
    size=st.integers(1, 20),
    steps=st.integers(1, 40),
    after=st.integers(0, 40),
)
def test_the_epochs_are_those_of_rows_counted_one_by_one(
    rows: int, size: int, steps: int, after: int
) -> None:
    interval = evaluation_interval(
        TrainConfig(eval_strategy="epoch"), plan_of(rows, size, max_steps=steps)
    )
    ends = set()
    for row in range(steps * size):
        if (row + 1) % rows == 0:
            ends.add(row // size + 1)
    expected = sorted(step for step in ends if step < steps)
    assert due(interval) == expected
    assert interval.count(after) == len([step for step in expected if step > after])


def test_epochs_of_a_batch_that_grows_end_where_its_rows_say() -> None:
    schedule = [[0, 2], [3, 4], [5, 8]]
    train = TrainConfig(batch_schedule=schedule, eval_strategy="epoch", num_train_epochs=3)
    # Rows after each step: 2, 4, 6, 10, 14, 22, 30, 38, 46, 48. Steps of 2 would end no epoch.
    plan = resolve_steps(train, ScheduleConfig(warmup_steps=0), 16, 2)
    interval = evaluation_interval(train, plan)
    assert plan.total_steps == 10
    assert [plan.rows_until(step) for step in (0, 3, 4, 5, 6, 9)] == [0, 6, 10, 14, 22, 46]
    assert due(interval) == [6, 8]
    assert interval.describe() == "every epoch (2 before the end)"
    # A size that begins after the end, and one that begins at once.
    for schedule in ([[0, 8], [99, 16]], [[0, 8]]):
        train = TrainConfig(batch_schedule=schedule, eval_strategy="epoch", num_train_epochs=3)
        plan = resolve_steps(train, ScheduleConfig(warmup_steps=0), 16, 8)
        assert due(evaluation_interval(train, plan)) == [2, 4]


@given(every=st.integers(1, 12), steps=st.integers(1, 40), after=st.integers(0, 40))
def test_every_so_many_steps_but_not_at_the_end(every: int, steps: int, after: int) -> None:
    interval = save_interval(TrainConfig(save_steps=every), plan_of(99, 1, max_steps=steps))
    expected = [step for step in range(1, steps) if step % every == 0]
    assert due(interval) == expected
    assert interval.count(after) == len([step for step in expected if step > after])


@pytest.mark.parametrize("strategy", ["no", False])
def test_no_is_never_however_yaml_reads_it(strategy: str | bool) -> None:
    plan = plan_of(40, 8, epochs=3)
    train = TrainConfig(eval_strategy=strategy, save_strategy=strategy)
    for interval in (evaluation_interval(train, plan), save_interval(train, plan)):
        assert due(interval) == []
        assert interval.count() == 0
        assert interval.describe() == "none before the end"


def test_they_are_described_as_people_say_it() -> None:
    plan = plan_of(40, 8, epochs=3)
    assert save_interval(TrainConfig(save_steps=4), plan).describe() == (
        "every 4 steps (3 before the end)"
    )
    assert save_interval(TrainConfig(save_steps=1), plan).describe() == (
        "every step (14 before the end)"
    )
    assert save_interval(TrainConfig(save_strategy="epoch"), plan).describe() == (
        "every epoch (2 before the end)"
    )
    assert evaluation_interval(TrainConfig(), plan).describe() == "none before the end"


def test_a_record_of_an_earlier_version_knows_no_epochs() -> None:
    plan = StepsPlan(total_steps=9, warmup_steps=0, total_rows=None, origin="")
    assert due(evaluation_interval(TrainConfig(eval_strategy="epoch"), plan)) == []

"""The best model and the early end: by transformers' rule, and the same however often a run is
killed.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.trainer import Trainer
from transformers.trainer_callback import EarlyStoppingCallback, TrainerControl
from transformers.trainer_callback import TrainerState as TheirState
from transformers.trainer_utils import SaveStrategy

from llmtune.checkpoint.best import BestSoFar, ends_early, update_best
from llmtune.checkpoint.resume_best import resume_best
from llmtune.checkpoint.retention import CheckpointInfo, Retention
from llmtune.checkpoint.trainer_state import TrainerState
from llmtune.config.best_model import BestModel
from llmtune.config.groups.train import TrainConfig
from llmtune.errors import ConfigError, StoppedError
from llmtune.plan.steps import StepsPlan
from tests.train.best_loop import Disk, Killed, train

#: Few different numbers, so that equal ones and small improvements come up; and what a diverging
#: model gives.
VALUES = st.lists(
    st.one_of(st.integers(0, 12).map(lambda n: n / 4), st.sampled_from([math.nan, math.inf])),
    min_size=1,
    max_size=14,
)
THRESHOLDS = st.sampled_from([0.0, 0.25, 0.6])


def rule(
    patience: int | None = None,
    threshold: float = 0.0,
    greater: bool = False,
    load_at_end: bool = True,
    metric: str = "eval_loss",
) -> BestModel:
    return BestModel(
        metric=metric,
        greater_is_better=greater,
        is_saved=True,
        load_at_end=load_at_end,
        patience=patience,
        threshold=threshold,
    )


@dataclass
class Choice:
    """What came of a sequence of evaluations."""

    best: int | None
    """The number of the best one, from 1."""
    end: int | None
    """The number of the one that ended the run."""


def ours(values: list[float], best_model: BestModel) -> Choice:
    best = BestSoFar()
    for number, value in enumerate(values, 1):
        best = update_best(best_model, best, {"step": number, best_model.metric: value})
        if ends_early(best_model, best):
            return Choice(best.step, number)
    return Choice(best.step, None)


def theirs(values: list[float], best_model: BestModel) -> Choice:
    """By transformers' own callback and trainer, called in the order of its training loop."""
    assert best_model.patience is not None
    arguments: Any = SimpleNamespace(
        metric_for_best_model="loss",
        greater_is_better=best_model.greater_is_better,
        save_strategy=SaveStrategy.STEPS,
        load_best_model_at_end=True,
    )
    state, control = TheirState(), TrainerControl()
    callback = EarlyStoppingCallback(best_model.patience, best_model.threshold)
    trainer: Any = SimpleNamespace(args=arguments, state=state)
    for number, value in enumerate(values, 1):
        state.global_step = number
        metrics = {"eval_loss": value}
        callback.on_evaluate(arguments, state, control, metrics)
        Trainer._determine_best_metric(trainer, metrics, None)
        if control.should_training_stop:
            return Choice(state.best_global_step, number)
    return Choice(state.best_global_step, None)


def by_hand(values: list[float], best_model: BestModel) -> Choice:
    """From the definition: looks back over all evaluations each time, and keeps no state."""
    sign = -1.0 if best_model.greater_is_better else 1.0
    losses = [math.inf if math.isnan(value) else sign * value for value in values]

    def lowest_before(number: int) -> float:
        return min(losses[:number], default=math.inf)

    improved = [
        number == 0 or lowest_before(number) - loss > best_model.threshold
        if math.isfinite(loss)
        else number == 0
        for number, loss in enumerate(losses)
    ]
    for number in range(len(values)):
        since = improved[: number + 1][::-1].index(True)
        if best_model.patience is not None and since >= best_model.patience:
            break
    else:
        number = len(values)
    seen = losses[: number + 1]
    finite = [loss for loss in seen if math.isfinite(loss)]
    best = seen.index(min(finite)) + 1 if finite else None
    return Choice(best, number + 1 if number < len(values) else None)


@settings(max_examples=400, deadline=None)
@given(VALUES, st.integers(1, 4), THRESHOLDS, st.booleans())
@example([math.nan, math.nan, 1.0], 1, 0.0, False)
@example([math.inf, 2.0, math.inf, math.inf], 2, 0.0, False)
@example([1.0, 1.5, 1.5], 1, 0.6, True)
def test_the_rule_is_that_of_transformers_and_of_its_definition(
    values: list[float], patience: int, threshold: float, greater: bool
) -> None:
    values = [-value if greater and math.isinf(value) else value for value in values]
    best_model = rule(patience, threshold, greater)
    found = ours(values, best_model)
    assert found == theirs(values, best_model)
    assert found == by_hand(values, best_model)


def test_an_improvement_up_to_the_threshold_is_a_best_that_does_not_count() -> None:
    best = BestSoFar(value=1.0, step=1, stale=0)
    best = update_best(rule(2, 0.5), best, {"step": 2, "eval_loss": 0.75})
    assert best == BestSoFar(value=0.75, step=2, stale=1)


def test_a_best_whose_evaluation_was_interrupted_is_saved_again_with_its_metrics() -> None:
    config = TrainConfig(eval_steps=2, save_steps=None)
    steps = StepsPlan(total_steps=8, warmup_steps=0, total_rows=None, origin="")
    disk = Disk(Retention(limit=1, best=rule()))
    with pytest.raises(StoppedError):
        train(disk, rule(), config, steps, {4: 0.5}, interrupt_at=4)
    assert sorted(disk.states) == [2, 4]
    assert disk.metrics[4] == {}
    assert disk.states[4].evaluation_due
    train(disk, rule(), config, steps, {4: 0.5})
    assert sorted(disk.states) == [4, 8]
    assert disk.metrics[4]["eval_loss"] == 0.5
    assert not disk.states[4].evaluation_due


def test_the_evaluation_before_the_first_step_does_not_count() -> None:
    assert update_best(rule(1), BestSoFar(), {"step": 0, "eval_loss": 0.1}) == BestSoFar()


def test_a_metric_that_the_evaluation_lacks_is_named_with_those_that_it_has() -> None:
    with pytest.raises(
        ConfigError, match="best_model=eval_f1: this evaluation has eval_accuracy, eval_loss$"
    ):
        update_best(
            rule(metric="eval_f1"),
            BestSoFar(),
            {"step": 4, "eval_loss": 1.0, "eval_accuracy": 0.5, "seconds": 3.0},
        )


@settings(max_examples=150, deadline=None)
@given(
    st.data(),
    VALUES,
    st.integers(1, 3),
    THRESHOLDS,
    st.sampled_from([None, 1, 2, 3, 5]),
    st.sampled_from([1, 2]),
    st.sampled_from([None, 1, 2]),
)
def test_a_run_that_is_killed_and_resumed_ends_as_the_undisturbed_one(
    data: st.DataObject,
    values: list[float],
    patience: int,
    threshold: float,
    save_steps: int | None,
    eval_steps: int,
    limit: int | None,
) -> None:
    total = len(values) * eval_steps
    config = TrainConfig(eval_steps=eval_steps, save_steps=save_steps)
    steps = StepsPlan(total_steps=total, warmup_steps=0, total_rows=None, origin="")
    evaluations = {(number + 1) * eval_steps: value for number, value in enumerate(values)}
    best_model = rule(patience, threshold)

    def start(disk: Disk, kill_after: int | None = None, interrupt_at: int | None = None) -> None:
        def check() -> None:
            """The best checkpoint is there whenever a save is over."""
            state = disk.states[max(disk.states)]
            assert state.best is None or state.best["step"] in disk.states
            if limit is not None:
                assert len(disk.states) <= limit + 1

        train(
            disk,
            best_model,
            config,
            steps,
            evaluations,
            kill_after=kill_after,
            interrupt_at=interrupt_at,
            after_save=check,
        )

    undisturbed, disturbed = (Disk(Retention(limit=limit, best=best_model)) for _ in range(2))
    start(undisturbed)
    for _ in range(3):
        moment = data.draw(st.integers(1, total + 1))
        with contextlib.suppress(Killed, StoppedError):
            if data.draw(st.booleans()):
                start(disturbed, kill_after=moment)
            else:
                start(disturbed, interrupt_at=moment)
    start(disturbed)
    assert undisturbed.result is not None
    assert disturbed.result is not None
    assert disturbed.result.best == undisturbed.result.best
    assert disturbed.result.step == undisturbed.result.step
    assert disturbed.states[undisturbed.result.step].best == (
        undisturbed.states[undisturbed.result.step].best
    )
    assert disturbed.summary == undisturbed.summary
    choice = ours(values, best_model)
    assert undisturbed.result.best.step == (choice.best and choice.best * eval_steps)
    assert undisturbed.result.step == (choice.end * eval_steps if choice.end else total)


def test_an_early_end_is_evaluated_once_and_trains_no_step_when_it_is_resumed() -> None:
    config = TrainConfig(eval_steps=2, save_steps=None)
    steps = StepsPlan(total_steps=20, warmup_steps=0, total_rows=None, origin="")
    disk = Disk(Retention(limit=1, best=rule(2)))
    values = {2: 1.0, 4: 0.5, 6: 0.7, 8: 0.6, 10: 0.1}
    train(disk, rule(2), config, steps, values)
    assert disk.evaluations == [0, 2, 4, 6, 8]
    assert sorted(disk.states) == [4, 8]
    assert disk.summary == {"best_step": 4, "best_eval_loss": 0.5}
    train(disk, rule(2), config, steps, values, kill_after=9)
    assert disk.evaluations == [0, 2, 4, 6, 8], "it is at its end already"
    train(disk, rule(3), config, steps, values)
    assert disk.result is not None
    assert (disk.result.step, disk.result.best.step) == (16, 10), "more patience trains on"


def test_without_a_rule_nothing_is_chosen_and_only_what_is_due_is_saved() -> None:
    config = TrainConfig(eval_steps=1, save_steps=4)
    steps = StepsPlan(total_steps=6, warmup_steps=0, total_rows=None, origin="")
    disk = Disk(Retention())
    train(disk, None, config, steps, {1: 0.5})
    assert sorted(disk.states) == [4, 6]
    assert disk.summary == {}
    assert disk.states[6].best is None


def test_another_rule_looks_through_the_checkpoints_that_there_are() -> None:
    state = TrainerState(
        step=6,
        tokens=0,
        skipped=0,
        data_fingerprint="",
        data_position=None,
        best={"metric": "eval_loss", "value": 0.5, "step": 4},
        best_goal="min eval_loss",
        stale_evaluations=1,
    )
    metrics = {2: 0.7, 4: 0.5, 6: 0.9, 8: 0.1}
    there = [
        CheckpointInfo(
            SimpleNamespace(),  # type: ignore[arg-type]
            step,
            {"eval_loss": loss, "eval_accuracy": loss},
        )
        for step, loss in metrics.items()
    ]
    assert resume_best(rule(), state, []) == BestSoFar(value=0.5, step=4, stale=1)
    assert resume_best(None, state, there) == BestSoFar()
    other = rule(metric="eval_accuracy", greater=True)
    assert resume_best(other, state, there) == BestSoFar(value=0.9, step=6, stale=0)
    assert resume_best(rule(greater=True), state, there) == BestSoFar(value=0.9, step=6, stale=0)
    assert resume_best(other, state, []) == BestSoFar()

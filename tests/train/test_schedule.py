"""The learning rate over the steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import optimization

from llmtune.config.compose import compose_config
from llmtune.config.groups.schedule import ScheduleConfig
from llmtune.errors import ConfigError
from llmtune.plan.steps import StepsPlan
from llmtune.run.settings import find_problems
from llmtune.train.hooks.samples import samples_reason_to_skip
from llmtune.train.schedule import (
    SCHEDULES,
    check_schedule,
    describe_extension,
    learning_rate_at,
)

KINDS = list(SCHEDULES.list())
TYPICAL = ScheduleConfig(min_lr_rate=0.1, decay_ratio=0.3, num_cycles=3)


def plan(total: int, warmup: int) -> StepsPlan:
    return StepsPlan(total_steps=total, warmup_steps=warmup, total_rows=None, origin="")


def curve(settings: ScheduleConfig, total: int, warmup: int, peak: float = 1.0) -> list[float]:
    steps = plan(total, warmup)
    return [learning_rate_at(step, steps, peak, settings) for step in range(total)]


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_rises_to_the_peak_and_never_starts_at_zero(kind: str) -> None:
    settings = replace(TYPICAL, lr_scheduler_type=kind)
    assert curve(settings, 20, 4)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert learning_rate_at(0, plan(20, 0), 1.0, settings) == 1.0


def of_transformers(make: Callable[..., Any], peak: float, total: int, **settings: Any) -> Any:
    """Every step's rate, by a scheduler of transformers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=peak)
    scheduler = make(optimizer, **settings)
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def draw_settings(kind: str, draws: random.Random, run: dict[str, int], peak: float) -> Any:
    """Settings of one kind, and the keywords of transformers that mean the same."""
    total, warmup = run["num_training_steps"], run["num_warmup_steps"]
    if kind == "cosine_with_min_lr":
        share = draws.random() * 0.9
        if draws.random() < 0.5:
            return {"min_lr": share * peak}, {**run, "min_lr": share * peak}
        return {"min_lr_rate": share}, {**run, "min_lr_rate": share}
    if kind == "cosine_with_restarts":
        cycles = draws.randint(1, 7)
        return {"num_cycles": cycles}, {**run, "num_cycles": cycles}
    if kind == "polynomial":
        own: dict[str, Any] = {
            "lr_end": peak * draws.random() * 0.9,
            "power": draws.uniform(0.2, 4),
        }
        return own, {**run, **own}
    if kind == "inverse_sqrt":
        scale = draws.choice([None, draws.randint(1, 200)])
        return {"timescale": scale}, {"num_warmup_steps": warmup, "timescale": scale}
    if kind == "warmup_stable_decay":
        own = {
            "num_decay_steps": draws.randint(1, total - warmup),
            "decay_type": draws.choice(["cosine", "linear", "1-sqrt"]),
        }
        least = draws.choice([0.0, draws.random() * 0.9])
        return {**own, "min_lr_rate": least or None}, {**run, **own, "min_lr_ratio": least}
    return {}, run


#: Kind -> the function of transformers.
REFERENCES: dict[str, Callable[..., Any]] = {
    "cosine": optimization.get_cosine_schedule_with_warmup,
    "linear": optimization.get_linear_schedule_with_warmup,
    "constant": lambda optimizer, num_warmup_steps, **_: (
        optimization.get_constant_schedule_with_warmup(optimizer, num_warmup_steps)
    ),
    "cosine_with_min_lr": optimization.get_cosine_with_min_lr_schedule_with_warmup,
    "cosine_with_restarts": optimization.get_cosine_with_hard_restarts_schedule_with_warmup,
    "polynomial": optimization.get_polynomial_decay_schedule_with_warmup,
    "inverse_sqrt": optimization.get_inverse_sqrt_schedule,
    "warmup_stable_decay": optimization.get_wsd_schedule,
}


def test_every_schedule_is_compared() -> None:
    assert set(REFERENCES) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_behind_the_warm_up_is_that_of_transformers(kind: str) -> None:
    draws = random.Random(kind)
    for _ in range(60):
        total = draws.randint(2, 70)
        warmup, peak = draws.randint(0, total - 1), 10 ** draws.uniform(-6, 0)
        run = {"num_warmup_steps": warmup, "num_training_steps": total}
        own, keywords = draw_settings(kind, draws, run, peak)
        settings = ScheduleConfig(lr_scheduler_type=kind, **own)
        check_schedule(settings, plan(total, warmup), peak)
        found = curve(settings, total, warmup, peak)
        expected = of_transformers(REFERENCES[kind], peak, total, **keywords)
        assert found[warmup:] == pytest.approx(expected[warmup:], rel=1e-9, abs=peak * 1e-12), own


def test_the_share_of_the_steps_that_decay_is_rounded_up() -> None:
    settings = ScheduleConfig(
        lr_scheduler_type="warmup_stable_decay", decay_ratio=0.25, decay_type="linear"
    )
    assert curve(settings, 10, 1) == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3], rel=1e-12
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule=cosine", "schedule.power=2"], "schedule.power=2.0: cosine does not read it"),
        (["schedule=wsd", "schedule.lr_end=0"], "schedule.lr_end=0.0: warmup_stable_decay does"),
        (
            ["schedule.lr_scheduler_type=cosine_with_min_lr"],
            "schedule.min_lr=None and schedule.min_lr_rate=None; set one of them",
        ),
        (
            ["schedule=cosine_with_min_lr", "schedule.min_lr=1e-6"],
            "schedule.min_lr=1e-06 and schedule.min_lr_rate=0.1; set one of them",
        ),
        (
            ["schedule=wsd", "schedule.num_decay_steps=50", "train.max_steps=40"],
            "0 steps of warm-up and 50 of decay are more than the 40 of the run",
        ),
        (
            ["schedule.lr_scheduler_type=wsd"],
            "cosine_with_restarts, inverse_sqrt, linear, polynomial, warmup_stable_decay",
        ),
        (
            ["schedule=wsd", "schedule.decay_type=sqrt"],
            "schedule.decay_type=sqrt: one of cosine, linear, 1-sqrt",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides: list[str], message: str) -> None:
    problems = find_problems(compose_config(overrides).config)
    assert len(problems) == 1
    assert message in problems[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.decay_ratio=1.5", "schedule.decay_ratio=1.5: a share of all steps"),
        ("schedule.min_lr_rate=1", "schedule.min_lr_rate=1.0: a share of the peak, below 1"),
        ("schedule.num_cycles=0", "schedule.num_cycles=0: must be above 0"),
        ("schedule.timescale=0", "schedule.timescale=0: must be above 0"),
    ],
)
def test_values_that_mean_nothing_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        compose_config([override])
    assert message in str(raised.value)


@pytest.mark.parametrize("option", ["wsd", *sorted(set(KINDS) - {"warmup_stable_decay"})])
def test_every_option_can_be_taken_as_it_is(option: str) -> None:
    config = compose_config([f"schedule={option}"]).config
    assert find_problems(config) == []
    check_schedule(config.schedule, plan(40, 4), 1e-4)
    schedule = SCHEDULES.find(config.schedule.lr_scheduler_type)
    assert schedule.describe(config.schedule).startswith(schedule.name)


@pytest.mark.parametrize(
    "settings",
    [
        ScheduleConfig(lr_scheduler_type="polynomial", lr_end=1e-4),
        ScheduleConfig(lr_scheduler_type="cosine_with_min_lr", min_lr=2e-4),
        ScheduleConfig(lr_scheduler_type="warmup_stable_decay", num_decay_steps=17),
    ],
)
def test_an_end_above_the_peak_and_a_decay_without_room_are_refused(
    settings: ScheduleConfig,
) -> None:
    with pytest.raises(ConfigError, match="schedule.(lr_end|min_lr|num_decay_steps)"):
        check_schedule(settings, plan(20, 4), 1e-4)
    check_schedule(settings, plan(60, 4), 1e-3)


def test_a_longer_run_says_what_becomes_of_the_learning_rate() -> None:
    before, now = plan(20, 2), plan(40, 2)
    texts = {
        kind: describe_extension(replace(TYPICAL, lr_scheduler_type=kind), 18, before, now)
        for kind in KINDS
    }
    unchanged = {kind for kind, text in texts.items() if "is unchanged" in text}
    assert unchanged == {"constant", "inverse_sqrt"}
    assert texts["linear"] == (
        "longer than before: 20 -> 40 steps; the schedule now runs to the new end: the learning"
        " rate of the next step is 0.5789 of its peak, not 0.1111"
    )
    assert "is 1 of its peak, not " in texts["warmup_stable_decay"]
    # Of a run that is at its end there is no next step to compare with.
    for kind in KINDS:
        over = describe_extension(replace(TYPICAL, lr_scheduler_type=kind), 20, before, now)
        assert over.endswith(" of its peak"), over
    # A warm-up that is a share of the steps grows with them.
    longer = describe_extension(
        ScheduleConfig(lr_scheduler_type="constant"), 2, before, plan(40, 4)
    )
    assert "the learning rate of the next step is 0.6 of its peak, not 1" in longer


def test_samples_are_skipped_where_they_would_gather_a_large_model() -> None:
    assert samples_reason_to_skip("auto", 10**8, True, 3) is None
    assert samples_reason_to_skip("auto", 10**10, False, 3) is None
    assert "gather" in str(samples_reason_to_skip("auto", 10**10, True, 3))
    assert samples_reason_to_skip(True, 10**10, True, 3) is None
    assert samples_reason_to_skip(False, 10, False, 3) is not None
    assert samples_reason_to_skip("auto", 10, False, 0) is not None

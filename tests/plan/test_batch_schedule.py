"""Rows per step that grow: against a list of batches made one by one, and refused where they
cannot be.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.cli.main import main
from llmtune.config.compose import compose_config
from llmtune.config.groups.schedule import ScheduleConfig
from llmtune.config.groups.train import BatchScheduleLr, BatchScheduleUnit, TrainConfig
from llmtune.errors import ConfigError
from llmtune.plan.advice import find_smallest_change
from llmtune.plan.batch_sizes import Ranks, batch_options, resolve_batch
from llmtune.plan.length.batch_schedule import BatchSchedule, Reached
from llmtune.plan.length.resolve_steps import resolve_steps
from llmtune.plan.resolve import resolve_ladder
from tests.support import TINY

UNITS = st.sampled_from(BatchScheduleUnit)
STEPS, TOKENS = BatchScheduleUnit.steps, BatchScheduleUnit.tokens
GROWING = "train.batch_schedule=[[0,8],[500,16],[2000,32]]"


@st.composite
def entries(draw: st.DrawFn, longest: int = 60) -> tuple[tuple[int, int], ...]:
    """Starts and sizes, both strictly growing, from 0 on."""
    count = draw(st.integers(1, 4))
    rising = st.lists(st.integers(1, longest), min_size=count - 1, max_size=count - 1, unique=True)
    starts = [0, *sorted(draw(rising))]
    sizes = sorted(draw(st.lists(st.integers(1, 12), min_size=count, max_size=count, unique=True)))
    return tuple(zip(starts, sizes, strict=True))


def plain_sizes(
    pairs: tuple[tuple[int, int], ...], unit: BatchScheduleUnit, rows: list[int]
) -> list[list[int]]:
    """The batches of a run over rows of these lengths, cut off one by one."""
    batches: list[list[int]] = []
    left = list(rows)
    while left:
        done = len(batches)
        if unit is TOKENS:
            done = sum(length for batch in batches for length in batch)
        size = 0
        for start, wanted in pairs:
            if done >= start:
                size = wanted
        batches.append(left[:size])
        left = left[size:]
    return batches


@given(entries(), UNITS, st.lists(st.integers(1, 9), min_size=1, max_size=150))
def test_sizes_are_those_of_batches_cut_off_one_by_one(
    pairs: tuple[tuple[int, int], ...], unit: BatchScheduleUnit, rows: list[int]
) -> None:
    schedule = BatchSchedule(pairs, unit)
    batches = plain_sizes(pairs, unit, rows)
    tokens = 0
    for step, batch in enumerate(batches):
        size = schedule.rows_at(Reached(step, tokens))
        assert len(batch) == size or (batch is batches[-1] and len(batch) < size)
        tokens += sum(batch)
    if not schedule.counts_tokens:
        assert schedule.count_steps(len(rows)) == len(batches)


@given(entries(), UNITS, st.integers(1, 80), st.integers(1, 9))
def test_a_prediction_counts_the_steps_of_each_size(
    pairs: tuple[tuple[int, int], ...], unit: BatchScheduleUnit, total: int, length: int
) -> None:
    expected: dict[int, int] = {}
    tokens = 0
    schedule = BatchSchedule(pairs, unit)
    for step in range(total):
        rows = schedule.rows_at(Reached(step, tokens))
        expected[rows] = expected.get(rows, 0) + 1
        tokens += rows * length
    assert schedule.steps_by_rows(total, length) == list(expected.items())
    assert schedule.steps_by_rows(None, length) == [(pairs[-1][1], 1)]


@given(entries(20), entries(20), st.integers(0, 25))
def test_two_schedules_agree_exactly_where_every_step_so_far_was_the_same(
    first: tuple[tuple[int, int], ...], second: tuple[tuple[int, int], ...], steps: int
) -> None:
    one, other = BatchSchedule(first), BatchSchedule(second)
    same = [one.rows_at(Reached(n)) for n in range(steps)] == [
        other.rows_at(Reached(n)) for n in range(steps)
    ]
    # Before the first step the rows of the run are what its folder says.
    if first[0] == second[0]:
        assert one.agrees_until(other, Reached(steps)) == same


def test_schedules_of_other_units_or_rates_agree_before_the_first_growth() -> None:
    pairs = ((0, 2), (10, 4))
    steps, tokens = BatchSchedule(pairs), BatchSchedule(pairs, TOKENS)
    scaled = BatchSchedule(pairs, scaling=BatchScheduleLr.sqrt)
    constant = BatchSchedule(((0, 2),))
    for other in (tokens, scaled, constant):
        assert steps.agrees_until(other, Reached(10, 10))
        assert not steps.agrees_until(other, Reached(11, 500))


def test_the_peak_rate_grows_with_the_first_size_as_its_measure() -> None:
    pairs = ((0, 8), (5, 24))
    factors = {
        scaling: [BatchSchedule(pairs, STEPS, scaling).rate_factor(rows) for rows in (8, 24)]
        for scaling in BatchScheduleLr
    }
    assert factors == {
        BatchScheduleLr.none: [1.0, 1.0],
        BatchScheduleLr.linear: [1.0, 3.0],
        BatchScheduleLr.sqrt: [1.0, math.sqrt(3)],
    }


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("[]", "a list of pairs"),
        ("[[0,8],[5]]", "a list of pairs"),
        ("[[0,8,1]]", "a list of pairs"),
        ("[[1,8]]", "the first size must begin at 0, not at 1"),
        ("[[0,8],[0,16]]", "16 rows begin at 0 steps, which must be above 0"),
        ("[[0,8],[9,16],[4,32]]", "32 rows begin at 4 steps, which must be above 9"),
        ("[[0,8],[9,4]]", "4 rows from 9 steps on are no more than the 8 before: sizes must grow"),
        ("[[0,8],[9,8]]", "sizes must grow"),
        ("[[0,0],[9,8]]", "a size must be above 0"),
        ("[[0,-8]]", "a size must be above 0"),
        ("[0,8]", "train.batch_schedule"),
        ("[[0,eight]]", "train.batch_schedule"),
        ("[[0,8.5]]", "train.batch_schedule"),
        ("8", "train.batch_schedule"),
    ],
)
def test_a_schedule_that_does_not_grow_is_refused(setting: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config([*TINY, f"train.batch_schedule={setting}"])
    assert part in str(caught.value)


@pytest.mark.parametrize("setting", ["[[0,1]]", "[[0,8],[500,16],[2000,32]]", "[[0, 3], [1, 4]]"])
def test_a_schedule_arrives_as_numbers(setting: str) -> None:
    config = compose_config([*TINY, f"train.batch_schedule={setting}"]).config
    assert config.train.batch_schedule == json.loads(setting)


def test_rows_that_are_also_set_must_be_those_of_the_first_step() -> None:
    with pytest.raises(ConfigError, match="contradicts train.batch_schedule, which begins with 8"):
        compose_config([*TINY, GROWING, "train.global_batch_size=32"])
    config = compose_config([*TINY, GROWING, "train.global_batch_size=8"]).config
    assert resolve_batch(config.train, Ranks(1)).global_batch_size == 8


def test_the_micro_batch_divides_every_size_and_accumulation_grows() -> None:
    train = TrainConfig(batch_schedule=[[0, 8], [5, 12], [9, 40]])
    for world in (1, 2, 4):
        options = batch_options(train, Ranks(world), 256, "cuda")
        assert [plan.micro_batch_size for plan in options] == [
            size for size in (4, 2, 1) if size * world <= 4
        ]
        for plan in options:
            for _, rows in train.batch_schedule or []:
                grown = plan.resized(rows)
                assert grown.micro_batch_size == plan.micro_batch_size
                product = grown.micro_batch_size * grown.accumulation_steps * world
                assert product == rows == grown.global_batch_size
    accumulating = TrainConfig(batch_schedule=[[0, 8], [5, 16]], gradient_accumulation_steps=4)
    assert resolve_batch(accumulating, Ranks(2)).micro_batch_size == 1


@pytest.mark.parametrize(
    ("world", "values", "part"),
    [
        (4, {}, r"among 4 ranks: \[5,10\] needs 8 or 12; \[9,18\] needs 16 or 20. Or take one of"),
        (16, {}, r"\[0,8\] needs 16"),
        (1, {"per_device_train_batch_size": 4}, r"1 rank x micro-batches of 4: \[5,10\] needs"),
        (1, {"per_device_train_batch_size": 4}, r"train.per_device_train_batch_size of one of \["),
        (1, {"per_device_train_batch_size": 3}, "does not divide the 8 rows per rank"),
        (1, {"gradient_accumulation_steps": 2}, r"micro-batches of 4: \[5,10\] needs 8 or 12"),
        (1, {"gradient_accumulation_steps": 3}, "does not divide the 8 rows per rank"),
        (
            2,
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
            "leave one of the three to auto",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_those_that_would(
    world: int, values: dict[str, Any], part: str
) -> None:
    train = TrainConfig(batch_schedule=[[0, 8], [5, 10], [9, 18]], **values)
    with pytest.raises(ConfigError, match=part):
        resolve_batch(train, Ranks(world))


def test_a_resumed_run_keeps_its_sizes_on_other_ranks() -> None:
    schedule = [[0, 12], [5, 16]]
    commands: list[dict[str, Any]] = [
        {"per_device_train_batch_size": 4},
        {"gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
    ]
    for typed in commands:
        train = TrainConfig(batch_schedule=schedule, **typed)
        begun = TrainConfig(batch_schedule=schedule, **typed, global_batch_size=12)
        assert resolve_batch(train, Ranks(1)).micro_batch_size == 4
        assert [
            resolve_batch(train, Ranks(world), begun).micro_batch_size for world in (1, 2, 4)
        ] == [*(4, 2, 1)]
        with pytest.raises(ConfigError, match=r"among 3 ranks: \[5,16\] needs 15 or 18"):
            resolve_batch(train, Ranks(3), begun)


def test_epochs_end_with_the_last_row_whatever_the_sizes() -> None:
    train = TrainConfig(batch_schedule=[[0, 2], [3, 4], [5, 8]], num_train_epochs=2)
    # 2 + 2 + 2 + 4 + 4 + 8 + 8 of 32, and 2 more.
    plan = resolve_steps(train, ScheduleConfig(warmup_ratio=0.5), 16, 2)
    assert (plan.total_steps, plan.total_rows, plan.warmup_steps) == (8, 32, 4)
    assert "16 rows, 2 per step, 4 after 3 steps, 8 after 5 steps" in plan.origin
    by_steps = resolve_steps(TrainConfig(**vars_of(train), max_steps=40), ScheduleConfig(), 16, 2)
    assert (by_steps.total_steps, by_steps.total_rows) == (40, None)
    assert "would be 8" in by_steps.origin


def vars_of(train: TrainConfig) -> dict[str, Any]:
    return {
        "batch_schedule": train.batch_schedule,
        "num_train_epochs": train.num_train_epochs,
    }


def test_a_plan_is_for_the_largest_size() -> None:
    """Stage 2 with the optimizer on the host keeps gradients there from two micro-batches on."""
    base = [
        *("model=llama3_8b", "hardware=1xh200", "data.train=rows.jsonl", "tuner=full"),
        *("zero=2", "offload=optimizer_cpu", "hardware.host_memory_bytes=500GB"),
        "train.per_device_train_batch_size=1",
    ]

    def host(*overrides: str) -> int:
        ladder = resolve_ladder(compose_config([*base, *overrides]).config, planning=True)
        assert ladder.chosen is not None
        return ladder.chosen.memory.host.total

    growing = host("train.batch_schedule=[[0,1],[10,4]]")
    assert growing == host("train.global_batch_size=4")
    assert growing > host("train.global_batch_size=1") + 10e9


def test_the_speed_is_the_mean_over_the_steps_of_all_sizes() -> None:
    base = ["model=llama3_8b", "hardware=1xh200", "data.train=rows.jsonl", "zero=0"]
    base += ["train.per_device_train_batch_size=1"]
    growing = "train.batch_schedule=[[0,1],[10,4]]"

    def seconds(*overrides: str) -> float:
        ladder = resolve_ladder(compose_config([*base, *overrides]).config, planning=True)
        assert ladder.chosen is not None
        return ladder.chosen.speed.step_seconds

    small, large = seconds("train.global_batch_size=1"), seconds("train.global_batch_size=4")
    mean = (10 * small + 30 * large) / 40
    assert seconds(growing, "train.max_steps=40") == pytest.approx(mean)
    assert seconds(growing, "train.max_steps=10") == pytest.approx(small)
    assert seconds(growing) == pytest.approx(large)


def test_plan_shows_every_size(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "model=llama3_8b", "hardware=1xh200", GROWING]
    assert main(arguments) == 0
    out = capfd.readouterr().out
    assert "8 per step, 16 after 500 steps, 32 after 2,000 steps" in out
    assert "after 2,000 steps: 32 rows = " in out
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["batch_schedule"] == [[0, 8], [500, 16], [2000, 32]]
    assert found["global_batch_size"] == 8
    [chosen] = [rung for rung in found["rungs"] if rung["name"] == found["chosen"]]
    sizes = chosen["batch_schedule"]
    assert [size["rows"] for size in sizes] == [8, 16, 32]
    micro = chosen["per_device_train_batch_size"]
    assert [size["gradient_accumulation_steps"] * micro for size in sizes] == [8, 16, 32]
    assert sizes[0]["step_seconds"] < sizes[1]["step_seconds"] < sizes[2]["step_seconds"]
    assert main(["plan", "model=llama3_8b", "hardware=1xh200", "--json"]) == 0
    assert "batch_schedule" not in capfd.readouterr().out


def test_a_plan_for_more_machines_rounds_every_size_up() -> None:
    config = compose_config(
        [
            *("model=llama3_70b", "hardware=8xa100_80gb", "data.train=rows.jsonl", "tuner=full"),
            *("offload=none", "train.batch_schedule=[[0,8],[500,24]]"),
        ]
    ).config
    ladder = resolve_ladder(config, planning=True)
    assert ladder.chosen is None
    assert find_smallest_change(config, ladder)

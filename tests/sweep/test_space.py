"""The search space: what is read, what is refused, and what becomes of a value."""

from __future__ import annotations

import json
import math
import warnings
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.config.compose import compose_config
from llmtune.config.stored import read_key
from llmtune.sweep.space import (
    Parameter,
    count_points,
    list_points,
    read_space,
    to_overrides,
)
from llmtune.sweep.study import _to_distribution


def read(raw: dict[str, Any]) -> dict[str, Parameter]:
    parameters, problems = read_space(raw)
    assert problems == []
    return {parameter.key: parameter for parameter in parameters}


def test_ranges_and_choices_are_read() -> None:
    space = read(
        {
            "optim.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
            "tuner.lora_r": {"choices": [8, 16]},
            "train.num_train_epochs": {"low": 1, "high": 2.0, "step": 0.25},
            "schedule.warmup_steps": {"low": 2, "high": 9, "step": 3},
            "optim": {"choices": ["adamw", "lion"]},
        }
    )
    rate, rank = space["optim.learning_rate"], space["tuner.lora_r"]
    assert (rate.low, rate.high, rate.is_log, rate.list_values()) == (1e-5, 1e-3, True, None)
    assert (rank.choices, rank.edges) == ((8, 16), (8, 16))
    assert space["train.num_train_epochs"].list_values() == [1.0, 1.25, 1.5, 1.75, 2.0]
    assert list(space["schedule.warmup_steps"].list_values() or ()) == [2, 5, 8]
    assert space["optim"].choices == ("adamw", "lion")
    assert count_points(list(space.values())) is None
    del space["optim.learning_rate"]
    assert count_points(list(space.values())) == 2 * 5 * 3 * 2
    assert len({str(point) for point in list_points(list(space.values()))}) == 60


def test_the_command_line_goes_over_the_file() -> None:
    file = {
        "optim.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
        "tuner.lora_r": {"choices": [8, 16]},
        "tuner.lora_dropout": {"choices": [0.0, 0.1]},
    }
    nested = {
        "optim": {"learning_rate": {"high": 1e-2}},
        "tuner": {"lora_r": {"low": 4, "high": 64}, "lora_dropout": None},
    }
    for raw in ({**file, **nested}, {**nested, **file}):
        space = read(raw)
        assert space.keys() == {"optim.learning_rate", "tuner.lora_r"}
        assert space["optim.learning_rate"].to_plain() == {"low": 1e-5, "high": 1e-2, "log": True}
        assert space["tuner.lora_r"].to_plain() == {"low": 4, "high": 64, "log": False}


def test_a_group_is_searched_beside_its_keys() -> None:
    found = read(
        {
            "optim": {"choices": ["adamw", "lion"], "learning_rate": {"low": 1e-5, "high": 1e-2}},
            "tuner": {"lora_r": {"choices": [8, 16]}, "choices": ["lora", "dora"]},
        }
    )
    assert sorted(found) == ["optim", "optim.learning_rate", "tuner", "tuner.lora_r"]
    # A misspelled word is not a key.
    _, (problem,) = read_space({"optim": {"choices": ["adamw"], "chioces": ["lion"]}})
    assert "optim.chioces: no such word" in problem


def test_what_is_stored_of_a_space_is_read_again() -> None:
    space = [
        Parameter(key="a", choices=("x", None, True, 2, 0.5)),
        Parameter(key="b", low=1, high=64, is_log=True, step=1),
        Parameter(key="c", low=2, high=9, step=3),
        Parameter(key="d", low=1e-5, high=1.0, is_log=True),
        Parameter(key="e", low=0.0, high=1.0, step=0.25),
    ]
    stored = json.loads(json.dumps({parameter.key: parameter.to_plain() for parameter in space}))
    assert read_space(stored) == (space, [])


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (8, "=8: {low: A, high: B}"),
        ([8, 16], "=[8, 16]: {low: A, high: B}"),
        ({}, ": a range needs low and high"),
        ({"low": 1}, ": a range needs low and high"),
        ({"low": 1, "high": 2, "max": 3}, ".max: no such word"),
        ({"choices": [1], "low": 1}, ": choices and low exclude each other"),
        ({"choices": []}, ".choices=[]: a list of values"),
        ({"choices": "abc"}, ".choices=abc: a list of values"),
        ({"choices": [[1, 2], 3]}, ".choices: [1, 2] is no single value; write a list as a text"),
        ({"choices": [1, 1]}, ".choices=[1, 1]: a value is there twice"),
        ({"choices": [1, True]}, ".choices=[1, True]: a value is there twice"),
        ({"low": 2, "high": 1}, ": low=2 must be below high=1"),
        ({"low": 1, "high": 1}, ": low=1 must be below high=1"),
        ({"low": "a", "high": 1}, ".low=a: a number"),
        ({"low": True, "high": 2}, ".low=True: a number"),
        ({"low": 0, "high": math.inf}, ".high=inf: a number"),
        ({"low": 0, "high": 1, "log": True}, ".low=0: must be above 0 with log=true"),
        ({"low": 1, "high": 2, "log": "yes"}, ".log=yes: true or false"),
        ({"low": 1, "high": 9, "log": True, "step": 2}, ".step=2: has no meaning with log=true"),
        ({"low": 0.0, "high": 1.0, "step": 0}, ".step=0: must be above 0"),
        ({"low": 0.0, "high": 1.0, "step": 2.0}, ".step=2.0: must be above 0, and at most"),
        ({"low": 1, "high": 9, "step": 0.5}, ".step=0.5: a whole number"),
    ],
)
def test_what_is_wrong_is_named_with_its_key(entry: Any, problem: str) -> None:
    parameters, problems = read_space({"train.num_train_epochs": entry})
    assert parameters == []
    assert problems[0].startswith(f"hparams_search.space.train.num_train_epochs{problem}")


def test_values_that_differ_in_the_last_digits_are_two() -> None:
    (parameter,), problems = read_space(
        {"optim.learning_rate": {"choices": [0.1234567, 0.1234568]}}
    )
    assert not problems
    assert len(parameter.choices) == 2


def test_a_key_that_no_file_has_cannot_be_taken_out() -> None:
    raw = {"tuner.lora_r": {"choices": [8, 16]}, "tuner": {"lora_dropuot": None}}
    parameters, (problem,) = read_space(raw)
    assert [parameter.key for parameter in parameters] == ["tuner.lora_r"]
    assert problem.startswith("hparams_search.space.tuner.lora_dropuot=null: the space has no such")
    assert read_space({**raw, "tuner": {"lora_r": None}}) == ([], [])


@given(
    st.decimals(-10, 10, places=3),
    st.integers(1, 50),
    st.decimals("0.001", 3, places=3),
    st.decimals(0, 1, places=3),
)
def test_each_step_of_a_range_is_a_value_that_optuna_takes(
    low: Decimal, count: int, step: Decimal, rest: Decimal
) -> None:
    """However its ends are rounded in binary numbers, and also where the last step is below."""
    high = low + count * step + rest * step
    entry = {"low": float(low), "high": float(high), "step": float(step)}
    (parameter,), problems = read_space({"optim.weight_decay": entry})
    assert not problems
    values = parameter.list_values()
    assert values is not None
    assert len(values) == parameter.count
    assert list(values) == [float(low + number * step) for number in range(len(values))]
    assert len(values) in (count + 1, count + 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distribution = _to_distribution(parameter)
    for value in values:
        assert distribution._contains(distribution.to_internal_repr(value)), value
        assert parameter.snap(value) == value
        assert parameter.snap(float(value or 0) + 1e-12) == value


def test_points_are_counted_without_a_list_of_them() -> None:
    entry = {"low": 0.0, "high": 1.0, "step": 1e-12}
    (parameter,), _ = read_space({"optim.weight_decay": entry})
    assert count_points([parameter, parameter]) == (10**12 + 1) ** 2


def test_all_problems_come_at_once() -> None:
    _, problems = read_space({"a.b": {"low": 2}, "c.d": {"choices": []}, "e.f": {"choices": [1]}})
    assert len(problems) == 2


@settings(max_examples=60, deadline=None)
@given(value=st.floats(1e-12, 1e6))
def test_every_digit_of_a_number_reaches_the_trial(value: float) -> None:
    (override,) = to_overrides({"optim.learning_rate": value})
    config = compose_config([override, "data.train=a.jsonl", "model.name_or_path=x"]).config
    assert config.optim.learning_rate == value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tuner.use_dora", True),
        ("tuner.lora_plus_ratio", None),
        ("tuner.lora_r", 8),
        ("schedule.lr_scheduler_type", "linear"),
        ("run_name", "a b, ${c} [d]"),
    ],
)
def test_other_values_reach_it_too(key: str, value: Any) -> None:
    overrides = [*to_overrides({key: value}), "data.train=a.jsonl", "model.name_or_path=x"]
    assert read_key(compose_config(overrides).config, key) == value

"""Curves keep their ends and extremes, and any line of a metrics file can be read."""

from __future__ import annotations

import json
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llmtune.report.columns import MOST_KEYS, read_columns, smooth, thin

numbers = st.floats(-1e300, 1e300)


@given(st.lists(numbers, min_size=1, max_size=400), st.integers(4, 80))
def test_a_thinned_curve_keeps_ends_and_extremes(values: list[float], most: int) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    kept = thin(points, most)
    assert len(kept) <= max(most, 4)
    assert set(kept) <= set(points)
    assert kept == sorted(kept)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert min(v for _, v in kept) == min(values)
    assert max(v for _, v in kept) == max(values)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=100))
def test_an_average_stays_between_the_values(values: list[float]) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    smoothed = smooth(points)
    assert [step for step, _ in smoothed] == [step for step, _ in points]
    slack = 1e-6 * (1 + max(map(abs, values)))
    assert all(min(values) - slack <= value <= max(values) + slack for _, value in smoothed)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(st.lists(st.dictionaries(st.text(max_size=5), json_values) | json_values, max_size=8))
def test_any_lines_become_columns_of_finite_numbers(lines: list[Any]) -> None:
    columns = read_columns(json.dumps(line).encode() for line in lines)
    for column in columns.by_key.values():
        assert len(column.steps) == len(column.values)
        assert all(map(math.isfinite, [*column.steps, *column.values]))


def test_infinite_losses_and_too_many_keys_are_left_out() -> None:
    many = {f"key{number}": 1 for number in range(2 * MOST_KEYS)}
    lines = [
        {"step": 1, "loss": float("inf"), "eval_loss": 10**400},
        {"step": 2, "loss": 3, **many},
    ]
    columns = read_columns(json.dumps(line).encode() for line in lines)
    assert list(columns.get("loss").points()) == [(2, 3)]
    assert "eval_loss" not in columns.by_key
    assert len(columns.by_key) == MOST_KEYS
    assert columns.last_step == 2

"""The time that a run takes, and its cost."""

from __future__ import annotations

import pytest

from llmtune import plan
from llmtune.plan.length.duration import predict_duration

PRICE = 2.5


def test_time_is_tokens_by_speed_and_cost_is_that_of_every_accelerator() -> None:
    found = predict_duration(1000.0, 8, PRICE, steps=360, step_tokens=10_000.0)
    assert found.seconds == pytest.approx(3600.0)
    assert found.rank_hours == pytest.approx(8.0)
    assert found.cost == pytest.approx(20.0)
    assert found.describe("cuda") == (
        "360 steps of full rows: 1:00:00, 8 GPU-hours, which cost 20.00 at hardware.gpu_hour_price"
    )


def test_without_steps_and_price_it_is_a_million_tokens_without_a_cost() -> None:
    found = predict_duration(1e6, 1, None)
    assert (found.seconds, found.cost) == (1.0, None)
    assert found.describe("cpu") == "a million tokens in full rows: 0:01"
    assert predict_duration(1e6, 1, None, 1, 1e6).describe("cpu") == "1 step of full rows: 0:01"


def test_a_plan_says_it_for_its_steps() -> None:
    job = ["experiment=llama3_70b_lora_8xa100", "train.max_steps=100"]
    found = plan(*job, f"hardware.gpu_hour_price={PRICE}")
    values = found.to_json()
    (rung,) = (rung for rung in values["rungs"] if rung["name"] == values["chosen"])
    assert values["duration"]["seconds"] == pytest.approx(100 * rung["step_seconds"])
    hours = 8 * 100 * rung["step_seconds"] / 3600
    assert values["duration"]["cost"] == pytest.approx(PRICE * hours)
    assert "100 steps of full rows: " in str(found)
    assert "hardware.gpu_hour_price" not in str(plan(*job))

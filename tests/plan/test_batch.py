"""One global batch size, whatever the ranks."""

from __future__ import annotations

from typing import Any

import pytest

from llmtune.config.schema import TrainConfig
from llmtune.errors import ConfigError
from llmtune.plan.batch import batch_options


def resolve(world: int = 1, length: int = 2048, accelerator: str = "cuda", **values: Any) -> tuple[int, int]:
    plan = batch_options(TrainConfig(**values), world, length, accelerator)[0]
    assert plan.micro_batch_size * plan.accumulation_steps * plan.world_size == plan.global_batch_size
    return plan.micro_batch_size, plan.accumulation_steps


def test_auto_fills_a_micro_batch_up_to_a_number_of_tokens() -> None:
    assert resolve(global_batch_size=64) == (16, 4)
    assert resolve(global_batch_size=64, length=8192) == (4, 16)
    assert resolve(global_batch_size=6, length=8192) == (3, 2)
    assert resolve(global_batch_size=8, length=384, accelerator="cpu") == (2, 4)


def test_the_ladder_gets_every_micro_batch_that_divides() -> None:
    options = batch_options(TrainConfig(global_batch_size=12), 2, 2048, "cuda")
    assert [(plan.micro_batch_size, plan.accumulation_steps) for plan in options] == [(6, 1), (3, 2), (2, 3), (1, 6)]


def test_either_number_gives_the_other() -> None:
    assert resolve(world=2, global_batch_size=32, per_device_train_batch_size=4) == (4, 4)
    assert resolve(world=2, global_batch_size=32, gradient_accumulation_steps=8) == (2, 8)


@pytest.mark.parametrize(
    ("world", "values", "part"),
    [
        (3, {"global_batch_size": 8}, "does not divide among 3 ranks: take 6 or 9"),
        (4, {"global_batch_size": 2}, "take 4 or 4"),
        (1, {"global_batch_size": 8, "per_device_train_batch_size": 3}, r"one of \[1, 2, 4, 8\]"),
        (2, {"global_batch_size": 8, "gradient_accumulation_steps": 3}, r"does not divide the 4 rows of a rank"),
        (
            2,
            {"global_batch_size": 8, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
            "leave one of them to auto",
        ),
    ],
)
def test_numbers_that_do_not_multiply_up_are_refused(world: int, values: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        resolve(world, **values)

"""One global batch size, whatever the ranks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from llmtune.config.groups.train import TrainConfig
from llmtune.errors import ConfigError
from llmtune.plan.batch_sizes import Ranks, StepRows, _divisors, batch_options, resolve_batch


def resolve(
    world: int = 1, length: int = 2048, accelerator: str = "cuda", **values: Any
) -> tuple[int, int]:
    plan = batch_options(TrainConfig(**values), Ranks(world), length, accelerator)[0]
    assert (
        plan.micro_batch_size * plan.accumulation_steps * plan.world_size == plan.global_batch_size
    )
    return plan.micro_batch_size, plan.accumulation_steps


def test_auto_fills_a_micro_batch_up_to_a_number_of_tokens() -> None:
    assert resolve(global_batch_size=64) == (16, 4)
    assert resolve(global_batch_size=64, length=8192) == (4, 16)
    assert resolve(global_batch_size=6, length=8192) == (3, 2)
    assert resolve(global_batch_size=8, length=384, accelerator="cpu") == (2, 4)


def test_the_ladder_gets_every_micro_batch_that_divides() -> None:
    options = batch_options(TrainConfig(global_batch_size=12), Ranks(2), 2048, "cuda")
    assert [(plan.micro_batch_size, plan.accumulation_steps) for plan in options] == [
        (6, 1),
        (3, 2),
        (2, 3),
        (1, 6),
    ]


def test_either_number_gives_the_other() -> None:
    assert resolve(world=2, global_batch_size=32, per_device_train_batch_size=4) == (4, 4)
    assert resolve(world=2, global_batch_size=32, gradient_accumulation_steps=8) == (2, 8)


@pytest.mark.parametrize(
    ("world", "values", "part"),
    [
        (3, {"global_batch_size": 8}, "does not divide among 3 ranks: take 6 or 9"),
        (4, {"global_batch_size": 2}, "take 4, or auto"),
        (1, {"global_batch_size": 8, "per_device_train_batch_size": 3}, r"one of \[1, 2, 4, 8\]"),
        (
            2,
            {"global_batch_size": 8, "gradient_accumulation_steps": 3},
            r"does not divide the 4 rows per rank",
        ),
        (
            2,
            {
                "global_batch_size": 8,
                "gradient_accumulation_steps": 2,
                "per_device_train_batch_size": 4,
            },
            "are 16 rows, not train.global_batch_size=8: leave one of the three to auto",
        ),
    ],
)
def test_numbers_that_do_not_multiply_up_are_refused(
    world: int, values: dict[str, Any], part: str
) -> None:
    with pytest.raises(ConfigError, match=part):
        resolve(world, **values)


@pytest.mark.parametrize(
    ("world", "values", "expected"),
    [
        (1, {}, 8),
        (2, {}, 8),
        (3, {}, 9),
        (7, {}, 14),
        (8, {}, 8),
        (16, {}, 16),
        (1, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}, 16),
        (16, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, 128),
        (1, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}, 1),
        (1, {"per_device_train_batch_size": 3}, 9),
        (2, {"per_device_train_batch_size": 32}, 64),
        (3, {"gradient_accumulation_steps": 2}, 12),
    ],
)
def test_rows_of_a_step_follow_from_the_ranks_and_what_is_set(
    world: int, values: dict[str, Any], expected: int
) -> None:
    assert resolve_batch(TrainConfig(**values), Ranks(world)).global_batch_size == expected


def test_any_two_of_the_three_settle_the_third() -> None:
    for world, micro, accumulation in itertools.product((1, 2, 3, 8, 16), (1, 2, 3, 5), (1, 2, 7)):
        rows = world * micro * accumulation
        given: dict[str, Any] = {
            "global_batch_size": rows,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": accumulation,
        }
        for left_out in (None, *given):
            values = {key: value for key, value in given.items() if key != left_out}
            assert resolve(world, **values) == (micro, accumulation)
            assert resolve_batch(TrainConfig(**values), Ranks(world)).global_batch_size == rows


TYPED: list[dict[str, Any]] = [
    {},
    {"per_device_train_batch_size": 2},
    {"per_device_train_batch_size": 4},
    {"gradient_accumulation_steps": 2},
    {"gradient_accumulation_steps": 16},
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
]


@pytest.mark.parametrize("values", TYPED)
def test_a_run_keeps_its_rows_a_step_on_other_ranks(values: dict[str, Any]) -> None:
    """The same command goes on wherever the rows divide, with micro-batches that are no larger than
    what was set.
    """
    for before, now in itertools.product((1, 2, 4, 8, 16), repeat=2):
        typed = TrainConfig(**values)
        rows = resolve_batch(typed, Ranks(before)).global_batch_size
        begun = TrainConfig(**{**values, "global_batch_size": rows})
        if rows % now:
            with pytest.raises(
                ConfigError,
                match=f"began with train.global_batch_size={rows}, .* among {now} ranks",
            ):
                batch_options(typed, Ranks(now), 2048, "cuda", begun)
            continue
        for plan in batch_options(typed, Ranks(now), 2048, "cuda", begun):
            assert (
                plan.micro_batch_size * plan.accumulation_steps * now
                == plan.global_batch_size
                == rows
            )
            assert plan.micro_batch_size <= values.get(
                "per_device_train_batch_size", plan.micro_batch_size
            )
            if now == before:
                given = (
                    values.get("per_device_train_batch_size"),
                    values.get("gradient_accumulation_steps"),
                )
                assert given[0] in (None, plan.micro_batch_size)
                assert given[1] in (None, plan.accumulation_steps)


def test_what_is_set_since_the_start_counts() -> None:
    begun = TrainConfig(global_batch_size=16)
    assert (
        resolve_batch(TrainConfig(per_device_train_batch_size=2), Ranks(4), begun).micro_batch_size
        == 2
    )
    with pytest.raises(
        ConfigError,
        match="train.per_device_train_batch_size=3 does not divide the 4 rows per rank",
    ):
        resolve_batch(TrainConfig(per_device_train_batch_size=3), Ranks(4), begun)
    other = TrainConfig(per_device_train_batch_size=1, gradient_accumulation_steps=32)
    assert resolve_batch(other, Ranks(1), begun).global_batch_size == 32, (
        "another run, which its folder refuses"
    )
    assert resolve_batch(TrainConfig(global_batch_size=32), Ranks(1), begun) == StepRows(
        32, None, None
    )
    with pytest.raises(ConfigError, match=r"resume with one of \[1, 2, 4, 8, 16\] ranks"):
        resolve_batch(TrainConfig(), Ranks(3), begun)


def test_a_billion_rows_a_step_are_counted_at_once() -> None:
    for number in range(1, 300):
        assert _divisors(number) == [size for size in range(1, number + 1) if number % size == 0]
    assert len(_divisors(10**12)) == 169

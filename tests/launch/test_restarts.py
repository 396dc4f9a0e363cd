"""Failed ranks are started again as long as there are new steps."""

from __future__ import annotations

import pytest

from llmtune.errors import LlmtuneError
from llmtune.launch.supervise.outcome import RanksFailedError
from llmtune.launch.supervise.restarts import Restarts


def failure(step: int, rollback: bool = False) -> RanksFailedError:
    return RanksFailedError(
        "rank 1 ended with signal SIGKILL; see log", "rank 1 ended", step, rollback
    )


def test_the_wait_doubles_up_to_a_minute_and_the_restarts_are_counted() -> None:
    restarts = Restarts(8)
    assert [restarts.take(failure(step), 0) for step in range(10, 90, 10)] == [
        1,
        2,
        4,
        8,
        16,
        32,
        60,
        60,
    ]
    assert restarts.describe(60) == " (restart 8 of 8) in 60 s"
    with pytest.raises(
        LlmtuneError,
        match=r"SIGKILL; see log\nNot started again: launch.max_restarts=8 are used up",
    ):
        restarts.take(failure(100), 0)


def test_an_attempt_without_a_new_step_is_repeated_once() -> None:
    restarts = Restarts(5)
    restarts.take(failure(10), 10)
    with pytest.raises(LlmtuneError, match="failed twice without a new step"):
        restarts.take(failure(10), 10)


def test_the_same_steps_made_again_are_no_new_steps() -> None:
    restarts = Restarts(9)
    restarts.take(failure(12), 10)
    restarts.take(failure(12), 10)
    restarts.take(failure(13), 10)
    restarts.take(failure(11), 10)
    with pytest.raises(LlmtuneError, match="failed twice without a new step"):
        restarts.take(failure(12), 10)


def test_no_restarts_means_none() -> None:
    with pytest.raises(LlmtuneError, match="SIGKILL") as caught:
        Restarts(0).take(failure(5), 0)
    assert not isinstance(caught.value, RanksFailedError)
    assert Restarts(0).take(failure(5, rollback=True), 0) == 0.0


def test_rollbacks_neither_wait_nor_count() -> None:
    restarts = Restarts(1)
    assert [restarts.take(failure(30, rollback=True), 20) for _ in range(5)] == [0.0] * 5
    assert restarts.describe(0.0) == ""
    assert restarts.take(failure(25), 20) == 1.0

"""Hints: each is said once for what it is about, and a healthy run has none."""

from __future__ import annotations

from typing import Any

import pytest

from llmtune.track.hints import RULES, Hints, Machine, read_shm

HEALTHY: dict[str, Any] = {
    "seconds": 1.0,
    "data_seconds": 0.01,
    "forward_seconds": 0.3,
    "backward_seconds": 0.6,
    "gather_seconds": 0.1,
    "grad_norm": 1.0,
}
QUIET = Machine(shm_used=0.1, shm_free_bytes=10**9)


def said(
    steps: int = 150, machine: Machine = QUIET, since: int = 0, **changed: Any
) -> list[tuple[int, str]]:
    """The hints of a run whose records are changed from a step on, and after which step."""
    hints: list[tuple[int, str]] = []
    now = 0
    tracker = Hints(
        lambda text: hints.append((now, text)), lambda: machine if now > since else QUIET
    )
    for step in range(1, steps + 1):
        now = step
        record = {"step": step, "loss": 3.0 - 0.001 * step, **HEALTHY}
        tracker.log({**record, **changed} if step > since else record)
        tracker.log({"step": step, "eval_loss": 2.0})
    return hints


def test_a_healthy_run_has_none() -> None:
    assert said() == []


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"data_seconds": 0.34}, ["waiting for data takes 34 %", "dataloader_num_workers"]),
        ({"gather_seconds": 0.5}, ["wait 56 %", "zero=2"]),
        ({"loss": 3.0}, ["does not fall", "3.0000", "optim.learning_rate"]),
        ({"grad_norm": 30.0, "since": 60}, ["was 30 in 3 of the last 20", "max_grad_norm"]),
        ({"machine": Machine(shm_used=0.95, shm_free_bytes=3_000_000)}, ["95 % full", "3.0 MB"]),
    ],
)
def test_what_is_wrong_is_said_once_with_its_number(case: dict[str, Any], words: list[str]) -> None:
    hints = said(**case)
    assert len(hints) == 1, hints
    for word in words:
        assert word in hints[0][1]


@pytest.mark.parametrize(
    "changed",
    [{"data_seconds": 0.1}, {"gather_seconds": 0.36}, {"grad_norm": 10.0, "since": 60}],
    ids=str,
)
def test_a_limit_itself_is_allowed(changed: dict[str, Any]) -> None:
    assert said(**changed) == []


def test_the_first_steps_do_not_count() -> None:
    """Their data, kernels and buffers are made then."""
    slow = {"data_seconds": 0.9}
    hints: list[str] = []
    tracker = Hints(hints.append, lambda: QUIET)
    for step in range(1, 60):
        tracker.log({"step": step, "loss": 3.0 / step, **HEALTHY, **(slow if step < 4 else {})})
    assert hints == []


def test_a_short_run_has_none() -> None:
    assert said(steps=1) == said(steps=19, data_seconds=0.9) == []


def test_records_without_phases_or_with_a_skipped_step_are_no_reason() -> None:
    hints: list[str] = []
    tracker = Hints(hints.append)
    for step in range(1, 200):
        tracker.log({"step": step, "loss": 3.0 / step, "grad_norm": 1.0, "seconds": 1.0})
        tracker.log({"step": step, "loss": 9.0, "grad_norm": None, "skipped": True})
    assert hints == []


def test_every_rule_has_a_name_of_its_own() -> None:
    assert len({rule.__name__ for rule in RULES}) == len(RULES)


def test_a_machine_without_shared_memory_says_nothing_of_it() -> None:
    assert read_shm("/nowhere") == Machine()

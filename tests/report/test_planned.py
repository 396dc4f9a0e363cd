"""What was planned beside what happened: arithmetic written out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtune.report.planned import (
    compare,
    largest_memory_bytes,
    measured_speed,
    planned_memory_bytes,
    seconds_by_phase,
)
from llmtune.report.run_facts import read_run
from tests.report.run_folder import PLAN, make_run


def test_each_number_has_its_ratio(tmp_path: Path) -> None:
    facts = read_run(make_run(tmp_path / "run"))
    # On a CPU a rank's memory is that of its accelerator and of the host.
    assert planned_memory_bytes(facts) == 600 + 400
    assert largest_memory_bytes(facts) == 500
    assert measured_speed(facts) == 50
    rows = {name: rest for name, *rest in compare(facts)}
    assert rows["memory of a rank at its peak"] == ["1.0 kB", "500 B", "0.50"]
    assert rows["tokens per second (planned for full rows, median)"] == ["100", "50", "0.50"]
    assert rows["seconds per step (of 50 tokens, median)"] == ["0.5", "1", "2.00"]
    assert rows["steps"] == ["8", "8", "1.00"]


def test_on_a_gpu_the_hosts_memory_does_not_count(tmp_path: Path) -> None:
    plan = {**PLAN, "hardware": {"accelerator": "cuda", "device_count": 1}}
    facts = read_run(make_run(tmp_path / "run", plan=plan))
    assert planned_memory_bytes(facts) == 600


@pytest.mark.parametrize("plan", [None, {}, {"memory": None}, {"tokens_per_second": 0}])
def test_without_a_plan_nothing_is_compared_with_it(plan: object, tmp_path: Path) -> None:
    facts = read_run(make_run(tmp_path / "run", plan=plan))
    assert planned_memory_bytes(facts) is None
    assert compare(facts) == []


def test_phases_are_those_of_the_start_or_the_sums_of_the_steps(tmp_path: Path) -> None:
    facts = read_run(make_run(tmp_path / "ended"))
    assert seconds_by_phase(facts) == [("backward pass", 3.0), ("forward pass", 2.0)]
    facts = read_run(make_run(tmp_path / "running", time=None))
    assert seconds_by_phase(facts) == [("backward pass", 8 * 0.75), ("forward pass", 8 * 0.25)]

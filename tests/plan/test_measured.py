"""The speed of this machine, from matrix products and from runs on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llmtune.config.compose import compose_config
from llmtune.config.schema import Precision
from llmtune.errors import ConfigError
from llmtune.plan.devices import measured
from llmtune.plan.devices.hardware import Hardware
from llmtune.plan.devices.measured import (
    REMEMBERED,
    STEP_SHARE,
    Reached,
    measure_products,
    read_reached,
    remember,
    use_measured,
)
from llmtune.plan.resolve import resolve_ladder, resolve_plan
from llmtune.plan.speed import reachable_flops
from llmtune.track.plan_check import PlanCheck
from llmtune.track.tracker import Outcome

CPU = Hardware(
    accelerator="cpu", device_count=1, device_memory_bytes=8, host_memory_bytes=8, flops=1e12
)

SIZE = 1000


def reached(flops: float, parameters: int = SIZE) -> Reached:
    return Reached(flops=flops, parameters=parameters, steps=10, time=0.0)


@pytest.mark.parametrize("precision", Precision)
def test_products_are_measured_once_and_runs_tell_better(
    precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Precision] = []

    def measure(_: str, precision: Precision) -> float:
        asked.append(precision)
        return 2e11

    monkeypatch.setattr(measured, "measure_products", measure)
    for _ in range(2):
        found = use_measured(CPU, precision, SIZE, tmp_path)
        assert reachable_flops(found, precision) == pytest.approx(2e11 * STEP_SHARE["cpu"])
        assert "of matrix products on this machine" in found.notes[-1]
    assert asked == [precision]

    # A GPU's table of speeds for fp32 does not count any more either.
    for flops in (1e10, 9e10, 4e10):
        remember(CPU, precision, reached(flops), tmp_path)
    found = use_measured(replace(CPU, fp32_flops=7.0), precision, SIZE, tmp_path)
    assert reachable_flops(found, precision) == pytest.approx(4e10)
    assert "3 runs of models of this size on this machine (the last on 1970" in found.notes[-1]
    # Another size says nothing about this one.
    for size, counts in ((4 * SIZE, True), (4 * SIZE + 4, False), (SIZE // 5, False)):
        assert ("the median" in use_measured(CPU, precision, size, tmp_path).notes[-1]) == counts
    others = [one for one in Precision if one is not precision]
    assert all(read_reached(CPU, one, tmp_path) == [] for one in others)
    assert read_reached(replace(CPU, name="another"), precision, tmp_path) == []


def test_old_runs_are_forgotten_and_a_cache_may_be_missing(tmp_path: Path) -> None:
    for number in range(1, REMEMBERED + 6):
        remember(CPU, Precision.bf16, reached(number), tmp_path)
    runs = read_reached(CPU, Precision.bf16, tmp_path)
    assert [run.flops for run in runs] == list(range(6, REMEMBERED + 6))
    blocked = tmp_path / "file"
    blocked.touch()
    remember(CPU, Precision.bf16, runs[0], blocked)
    assert read_reached(CPU, Precision.bf16, blocked) == []


@pytest.mark.parametrize(
    "content",
    ["", "{", "3", "null", "{}", '[3, null, {"a": 1}]']
    + [
        f'[{{"flops": {flops}, "parameters": {parameters}, "steps": 10, "time": {ended}}}]'
        for flops, parameters, ended in (
            *(("0", 9, 0), ("-1", 9, 0), ("NaN", 9, 0), ('"9"', 9, 0), ("true", 9, 0)),
            *((1, "null", 0), (1, 9, "null"), (1, 9, "1e30"), (1, 9, "NaN")),
        )
    ],
)
def test_a_damaged_file_is_none(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "measure_products", lambda *_: 2e11)
    use_measured(CPU, Precision.bf16, SIZE, tmp_path)
    remember(CPU, Precision.bf16, reached(1.0), tmp_path)
    files = list((tmp_path / "speeds").iterdir())
    assert len(files) == 2
    for file in files:
        file.write_text(content)
    assert read_reached(CPU, Precision.bf16, tmp_path) == []
    if content != "3":
        found = use_measured(CPU, Precision.bf16, SIZE, tmp_path)
        assert found.flops == pytest.approx(2e11 * STEP_SHARE["cpu"])


def test_products_have_a_speed() -> None:
    assert measure_products("cpu", Precision.fp32, seconds=0.01) > 1e8


def test_other_hardware_is_not_measured_here() -> None:
    config = compose_config(["model=tiny", "hardware=1xh200", "hardware.measured=true"]).config
    with pytest.raises(ConfigError, match="cannot be measured here; take hardware=measured"):
        resolve_ladder(config, planning=True)
    config = compose_config(["model=tiny", "hardware=measured", "hardware.gpu_flops=1e12"]).config
    with pytest.raises(ConfigError, match="hardware.gpu_flops=1000.*take hardware=probe"):
        resolve_ladder(config, planning=True)


@pytest.mark.parametrize(("offload", "remembered"), [("none", 1), ("optimizer_cpu", 0)])
def test_a_run_is_compared_after_ten_steps_and_remembered(
    offload: str, remembered: int, tmp_path: Path
) -> None:
    overrides = [
        "model=tiny",
        f"offload={offload}",
        "precision=fp32",
        f"paths.cache_dir={tmp_path}",
    ]
    plan = resolve_plan(compose_config(overrides).config)
    said: list[str] = []
    check = PlanCheck(plan, Precision.fp32, tmp_path, said.append)
    for step in range(1, 13):
        # The first step is slow, and one was left out.
        speed = plan.tokens_per_second * (0.01 if step == 1 else 0.5)
        check.log({"step": step, "tokens_per_second": speed, "seconds": 2.0, "memory_bytes": 5})
        check.log({"step": step, "skipped": True, "tokens_per_second": 1.0})
        check.log({"step": step, "eval_loss": 1.0})
    check.finish(Outcome.finished)
    assert len(said) == 1
    assert said[0].startswith("after 10 steps: ")
    assert "(0.50 of it); 2 s a step; memory 5 B, planned " in said[0]
    runs = read_reached(plan.hardware, Precision.fp32, tmp_path)
    assert len(runs) == remembered
    expected = reachable_flops(plan.hardware, Precision.fp32) / 2
    assert all(run.flops == pytest.approx(expected) for run in runs)

    # The next plan is made with it, and is what was measured.
    if remembered:
        again = resolve_plan(compose_config([*overrides, "hardware=measured"]).config)
        assert reachable_flops(again.hardware, Precision.fp32) == pytest.approx(expected)
        assert again.tokens_per_second < plan.tokens_per_second


def test_a_short_run_says_nothing(tmp_path: Path) -> None:
    plan = resolve_plan(compose_config(["model=tiny", "precision=fp32"]).config)
    check = PlanCheck(plan, Precision.fp32, tmp_path, pytest.fail)
    for step in range(9):
        check.log({"step": step, "tokens_per_second": 1.0, "seconds": 1.0})
    check.finish(Outcome.failed)
    assert read_reached(plan.hardware, Precision.fp32, tmp_path) == []

"""MFU and HFU against arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmtune.config.compose import compose_config
from llmtune.config.schema import Precision
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.plan.memory.recomputed_layers import RecomputedLayers
from llmtune.plan.plan import Plan
from llmtune.plan.resolve import resolve_plan
from llmtune.track.utilization import Utilization, find_utilization

LENGTH = 1024
#: Llama-2-7B: four square matrices and three of the MLP in 32 layers, and the output projection.
LAYERS, HEAD = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32_000 * 4096
#: Queries by keys, and weights by values, of half a row on average.
ATTENTION = 32 * 2 * 2 * (LENGTH / 2) * 4096
PEAK = 8 * 312e12


def planned(tuner: str, recomputes: bool) -> Plan:
    """A plan for eight A100 of Llama-2-7B, as far as it is read."""
    config = compose_config(["model=llama2_7b", f"tuner={tuner}"]).config
    plan = resolve_plan(compose_config(["model=tiny"]).config, 1)
    return replace(
        plan,
        shape=resolve_shape(config.model, config.tuner),
        hardware=replace(plan.hardware, accelerator="cuda", flops=312e12),
        world_size=8,
        recomputed=RecomputedLayers(32 if recomputes else 0, 32),
    )


def test_of_a_full_fine_tuning() -> None:
    plan = planned("full", recomputes=True)
    found = find_utilization(plan, LENGTH, Precision.bf16).shares(30_000.0)
    forward = 2 * (LAYERS + HEAD) + ATTENTION
    assert found["mfu"] == pytest.approx(30_000 * 3 * forward / PEAK, rel=1e-3)
    computed = 4 * forward - 2 * HEAD
    assert found["hfu"] == pytest.approx(30_000 * computed / PEAK, rel=1e-3)


def test_of_adapters_whose_base_has_no_gradient() -> None:
    plan = planned("lora", recomputes=False)
    found = find_utilization(plan, LENGTH, Precision.bf16).shares(30_000.0)
    forward = 2 * (LAYERS + HEAD) + ATTENTION
    assert found["mfu"] == found["hfu"]
    assert found["mfu"] == pytest.approx(30_000 * 2 * forward / PEAK, rel=0.03)


def test_a_cpu_has_neither() -> None:
    plan = resolve_plan(compose_config(["model=tiny"]).config, 1)
    assert find_utilization(plan, LENGTH, Precision.fp32).shares(100.0) == {}
    assert Utilization().shares(1.0) == {}

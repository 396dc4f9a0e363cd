"""Two agents of a sweep on one machine, each with the GPUs that ``CUDA_VISIBLE_DEVICES`` names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cuda.test_program import GPUS, ON_GPUS
from tests.sweep.test_wandb_files import run_two_agents

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.usefixtures("pretend_gpu")]


def test_each_agent_trains_on_its_own_gpus(tmp_path: Path) -> None:
    """Of four, as docs/sweeps.md has it; without a word about the number of ranks."""
    key, _, value = ON_GPUS.partition("=")
    settings = {key: value, "model.attn_implementation": "eager", "precision": "fp32"}
    machine = {**GPUS, "PRETEND_DEVICES": "4"}
    variables = [{**machine, "CUDA_VISIBLE_DEVICES": gpus} for gpus in ("0,1", "2,3")]
    for folder in run_two_agents(tmp_path, settings, variables):
        plan = json.loads((folder / "plan.json").read_text())
        assert plan["hardware"]["accelerator"] == "cuda"
        assert plan["world_size"] == 2

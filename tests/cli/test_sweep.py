"""``conf/sweep/lora.yaml`` as W&B's agent runs it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from llmtune.config.compose import compose_config
from llmtune.config.keys import known_keys
from tests.support import ROOT, run

SWEEP = yaml.safe_load((ROOT / "conf" / "sweep" / "lora.yaml").read_text())


def agent_command(parameters: dict[str, Any]) -> list[str]:
    """The command line that the agent makes of the file and of the values that the server sends."""
    macros = create_sweep_command_args(
        {"args": {name: {"value": value} for name, value in parameters.items()}}
    )
    macros["env"] = ["/usr/bin/env"]
    command: list[str] = []
    for part in create_sweep_command(list(SWEEP["command"])):
        command += macros[part[2:-1]] if part.startswith("${") else [part]
    return command


def test_every_swept_parameter_is_a_key() -> None:
    assert set(SWEEP["parameters"]) <= known_keys()
    assert SWEEP["metric"]["name"] == "eval_loss"
    values = {
        "optim.learning_rate": 3e-4,
        "tuner.lora_r": 8,
        "schedule.lr_scheduler_type": "linear",
    }
    arguments = [text for text in agent_command(values) if "=" in text]
    config = compose_config(arguments).config
    assert (config.optim.learning_rate, config.tuner.lora_r) == (3e-4, 8)


@pytest.mark.process
def test_the_agents_command_line_runs(tmp_path: Path) -> None:
    values = {
        "optim.learning_rate": 0.002,
        "tuner.lora_r": 8,
        "schedule.lr_scheduler_type": "cosine",
        "model": "tiny",
        "data.train": "stdlib_docs@100",
        "data.val_set_size": 8,
        "train.max_steps": 2,
    }
    env = {
        "WANDB_SWEEP_ID": "sweep1",
        "WANDB_RUN_ID": "run1",
        "WANDB_MODE": "offline",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = run(agent_command(values), cwd=tmp_path, env=env)
    assert done.code == 0, done.out + done.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == "tiny-lora-stdlib_docs-run1", (
        "each run of a sweep has a folder of its own"
    )
    assert list(folder.glob("wandb/offline-run-*-run1/*.wandb"))

"""Memory that really runs out: a run goes down the ladder by itself, from its last checkpoint, to the same loss curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import Finished, losses, run_cli

#: 126 M parameters, all trained: 2.5 GB of states without offload, 0.7 GB with the optimizer on NVMe. A CPU rank itself takes
#: 2.2 GB of address space before that, most of it stacks of threads.
JOB = [
    *("model=tiny", "model.config.hidden_size=1280", "model.config.intermediate_size=5120", "tuner=full"),
    *("model.config.num_hidden_layers=4", "model.config.num_attention_heads=20", "model.config.num_key_value_heads=20"),
    *("model.config.head_dim=64", "model.config.vocab_size=8192", "model.config.tie_word_embeddings=false"),
    *("data.max_seq_length=256", "data.overlong=truncate", "train.global_batch_size=2", "train.max_steps=4"),
    *("train.save_steps=2", "train.sample_answers=false", "train.eval_max_rows=64", "export=none"),
]
#: Too little for the optimizer's moments beside weights and gradients.
AT_THE_FIRST_STEP = "launch.memory_limit=3750MiB"
#: Enough for the steps, too little for a large evaluation beside the moments; it comes after the checkpoint of step 2.
AFTER_A_CHECKPOINT = ["launch.memory_limit=4700MiB", "train.eval_steps=3", "train.per_device_eval_batch_size=64"]


def train(folder: Path, *overrides: str) -> Finished:
    return run_cli(*JOB, *overrides, f"output_dir={folder}", f"offload.nvme_path={folder.parent}/nvme", timeout=900)


def plan(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "plan.json").read_text()))


@pytest.mark.slow
def test_a_run_that_runs_out_of_memory_finishes_lower_with_the_same_curve(tmp_path: Path) -> None:
    unlimited = train(tmp_path / "unlimited")
    assert unlimited.code == 0, unlimited.err
    curve = losses(tmp_path / "unlimited")
    for name, limit, phase in (
        ("first", [AT_THE_FIRST_STEP], "step"),
        ("later", AFTER_A_CHECKPOINT, "evaluate"),
    ):
        run = tmp_path / name
        done = train(run, *limit)
        assert done.code == 0, done.out[-1500:] + done.err
        assert "taking the next rung: " in done.out
        found = plan(run)
        assert found["placement"]["optimizer"] == "nvme"
        assert found["history"][0]["candidate"]["optimizer"] == "none"
        assert found["history"][0]["phase"] == phase
        assert found["history"][0]["peak_bytes"] > 10**9
        assert losses(run) == pytest.approx(curve, abs=2e-3)
        assert not list((tmp_path / "nvme").iterdir()), "swap files are left"
    assert plan(tmp_path / "later")["history"][0]["step"] == 3


@pytest.mark.slow
def test_an_explicit_placement_is_not_left(tmp_path: Path) -> None:
    refused = train(tmp_path / "run", AT_THE_FIRST_STEP, "offload=none")
    assert refused.code == 3, refused.out + refused.err
    for part in ("out of host memory in step", "offload=none was asked for", "offload=auto", "optimizer_nvme"):
        assert part in refused.err
    # What was tried is remembered: the next start with offload=auto does not try it again.
    again = train(tmp_path / "run", AT_THE_FIRST_STEP, "offload=auto", "train.max_steps=1")
    assert again.code == 0, again.out[-1500:] + again.err
    assert "ran out of memory before" in again.out

"""Runs that publish their best model: adapters and whole models, every export, ZeRO 3."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from llmtune.storage.manifest import find_damage
from tests.support import TINY, run_cli

pytestmark = pytest.mark.process

BASE = [
    *TINY,
    "data.train=stdlib_docs@60",
    "data.val_set_size=16",
    "precision=fp32",
    "schedule=constant",
    "train.global_batch_size=8",
    "train.save_total_limit=1",
]


def read_json(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(file.read_text())
    return values


def read_tensors(file: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(file).tensors}


def test_a_whole_model_under_zero_3_is_that_of_the_best_epoch_and_so_is_its_gguf(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    command = [
        *BASE,
        *("tuner=full", "zero=3", "launch.nproc=2", "optim.learning_rate=3e-2"),
        *("train.num_train_epochs=6", "train.eval_strategy=epoch", "train.save_strategy=no"),
        *("train.early_stopping_patience=2", f"output_dir={run}"),
    ]
    refused = run_cli(*command, "train.load_best_model_at_end=true")
    assert refused.code == 2
    assert "train.load_best_model_at_end=true needs checkpoints" in refused.err

    command[command.index("train.save_strategy=no")] = "train.save_strategy=epoch"
    done = run_cli(*command, "train.load_best_model_at_end=true", "export=gguf")
    assert done.code == 0, done.err + done.out
    finished = read_json(run / "finished.json")
    best, last = finished["best"]["step"], finished["step"]
    # 43 rows, 8 per step.
    evaluations = [
        record
        for record in map(json.loads, (run / "metrics.jsonl").open())
        if record.get("eval_loss")
    ]
    assert [record["step"] for record in evaluations] == [0, 6, 11, 17, 22, 27]
    assert (best, last) == (17, 27)
    assert finished["best"]["value"] == min(record["eval_loss"] for record in evaluations)
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-17", "checkpoint-27"}
    assert f"the trained model is that of step {best}, the best" in done.out
    weights = "model.safetensors"
    assert (run / "model" / weights).read_bytes() == (run / "checkpoint-17" / weights).read_bytes()
    assert find_damage(run / "model") == []
    manifest = read_json(run / "model" / "manifest.json")
    assert (manifest["step"], manifest["last_step"], manifest["best"]) == (
        17,
        27,
        finished["best"],
    )
    card = (run / "export-gguf" / "README.md").read_text()
    assert " to step 17, as " in card
    value = f"{finished['best']['value']:.4f}"
    assert f"step 17 of the 27 that were trained, with the best eval_loss: {value}" in card
    other = tmp_path / "of-the-checkpoint"
    exported = run_cli(
        "export", f"checkpoint={run / 'checkpoint-17'}", "export=gguf", f"output_dir={other}"
    )
    assert exported.code == 0, exported.err
    file = "model-f16.gguf"
    assert read_tensors(run / "export-gguf" / file) == read_tensors(other / file)
    assert read_tensors(other / file)

    # The same command has nothing to do; without the best it publishes the last, and trains none.
    lines = (run / "metrics.jsonl").read_text()
    again = run_cli(*command, "train.load_best_model_at_end=true", "export=gguf")
    assert again.code == 0
    assert "stopped early: eval_loss did not improve in 2 evaluations" in again.out
    assert "resuming" not in again.out
    without = run_cli(*command, "export=none")
    assert without.code == 0, without.err
    assert (run / "metrics.jsonl").read_text() == lines
    assert (run / "model" / weights).read_bytes() == (run / "checkpoint-27" / weights).read_bytes()
    assert "the trained model is that of step 27, the last" in without.out


@pytest.mark.slow
def test_an_adapter_and_its_merged_model_are_those_of_an_older_best_checkpoint(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    command = [
        *BASE,
        *("tuner=lora", "launch.nproc=1", "optim.learning_rate=2e-2", "train.eval_steps=3"),
        *("train.max_steps=21", "train.save_steps=5", "train.load_best_model_at_end=true"),
        "schedule.warmup_steps=3",
    ]
    done = run_cli(*command, f"output_dir={run}")
    assert done.code == 0, done.err + done.out
    finished = read_json(run / "finished.json")
    best = finished["best"]["step"]
    assert not finished["stopped_early"]
    assert (best, finished["published_step"], finished["step"]) == (12, 12, 21)
    weights = "adapter_model.safetensors"
    kept = run / f"checkpoint-{best}"
    assert (run / "adapter" / weights).read_bytes() == (kept / weights).read_bytes()
    other = tmp_path / "merged"
    exported = run_cli("export", f"checkpoint={kept}", "export=safetensors", f"output_dir={other}")
    assert exported.code == 0, exported.err
    file = "model.safetensors"
    assert (run / "merged" / file).read_bytes() == (other / file).read_bytes()
    assert "optimizer steps | 12 of 21 |" in (run / "merged" / "README.md").read_text()

    # Longer, from the last checkpoint: the best one is the older one still.
    elsewhere = tmp_path / "checkpoint-21"
    shutil.copytree(run / "checkpoint-21", elsewhere)
    longer = run_cli(*command, "train.max_steps=24", "export=none", f"output_dir={run}")
    assert longer.code == 0, longer.err
    assert f"resuming       {run / 'checkpoint-21'}" in longer.out
    finished = read_json(run / "finished.json")
    assert (finished["best"]["step"], finished["step"]) == (12, 24)
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-12", "checkpoint-24"}

    # Another run that begins from a checkpoint of this one has no folder of the best.
    begun = tmp_path / "begun"
    continued = run_cli(
        *command,
        "train.max_steps=24",
        "export=none",
        f"resume_from_checkpoint={elsewhere}",
        f"output_dir={begun}",
    )
    assert continued.code == 0, continued.err
    finished = read_json(begun / "finished.json")
    assert (finished["best"]["step"], finished["published_step"]) == (12, 24)
    assert "warning: eval_loss was best at step 12" in continued.out

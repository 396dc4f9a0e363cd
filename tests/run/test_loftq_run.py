"""A run whose adapter belongs to the base in 4 bits: evaluated and merged on that base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import TINY, run_cli


@pytest.mark.process
def test_its_loss_is_that_of_the_training_wherever_it_is_taken(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start = ["tuner=qlora", "tuner.init_lora_weights=loftq"]
    export = ["export=safetensors", "export.merge_onto=nf4", "export.dtype=fp32"]
    done = run_cli(
        *("train", *TINY, *start, *export, "precision=fp32", "train.max_steps=6"),
        f"output_dir={run}",
    )
    assert done.code == 0, done.out + done.err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line["eval_loss"] for line in lines if "eval_loss" in line][-1]
    for target in ([f"run={run}"], [*TINY, "precision=fp32", f"base={run / 'merged'}"]):
        found = run_cli("eval", *target, "--json")
        assert found.code == 0, found.out + found.err
        assert json.loads(found.out)["eval_loss"] == pytest.approx(trained, abs=1e-5), target

    refused = run_cli("export", f"run={run}", "export=safetensors", "export.merge_onto=original")
    assert refused.code == 2
    assert "take export.merge_onto=nf4" in refused.err

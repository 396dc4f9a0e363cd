"""A tuner from a file of one's own is planned, trained, resumed and exported like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtune.storage.manifest import find_damage
from tests.extend.test_export_format import JOB
from tests.support import run_cli

ENV = {"LLMTUNE_PLUGINS": "tests.extend.norms_tuner"}


@pytest.mark.process
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_only_what_it_names_is_trained(stage: int, tmp_path: Path) -> None:
    (tmp_path / "conf/tuner").mkdir(parents=True)
    (tmp_path / "conf/tuner/norms.yaml").write_text("kind: norms\n")
    job = [*JOB, "tuner=norms", f"zero={stage}", f"--config-dir={tmp_path / 'conf'}"]
    run = tmp_path / "run"
    done = run_cli(*job, "export=pt", f"output_dir={run}", "launch.nproc=2", env=ENV)
    assert done.code == 0, done.err

    plan = json.loads((run / "plan.json").read_text())
    trained = load_file(run / "model/model.safetensors")
    base = load_file(Path(plan["model_folder"]) / "model.safetensors")
    changed = {name for name, tensor in trained.items() if not torch.equal(tensor, base[name])}
    vectors = {name for name, tensor in base.items() if tensor.dim() == 1}
    assert changed == vectors
    assert plan["shape"]["trainable_parameters"] == sum(base[name].numel() for name in vectors)
    assert "training of norms trains" in done.out + done.err
    assert find_damage(run / "export-pt") == []
    assert "training of norms" in (run / "export-pt/README.md").read_text()

    # The same command with more steps goes on from the checkpoint.
    more = run_cli(*job, "train.max_steps=2", f"output_dir={run}", "launch.nproc=2", env=ENV)
    assert more.code == 0, more.err
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in losses if "loss" in record] == [1, 2]


def test_what_it_cannot_do_is_refused_before_anything_begins(tmp_path: Path) -> None:
    from llmtune.cli.main import main

    assert main([*JOB, "tuner.kind=normz", f"output_dir={tmp_path}/run"]) == 2
    assert not (tmp_path / "run").exists()

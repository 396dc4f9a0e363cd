"""An optimizer from a file of one's own is planned, trained and resumed like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.extend.test_export_format import JOB
from tests.support import losses, run_cli

ENV = {"LLMTUNE_PLUGINS": "tests.extend.plain_adam"}


@pytest.mark.process
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_run_trains_and_resumes_with_it(stage: int, tmp_path: Path) -> None:
    (tmp_path / "conf/optim").mkdir(parents=True)
    (tmp_path / "conf/optim/plain_adam.yaml").write_text("kind: plain_adam\nbetas: [0.8, 0.95]\n")
    job = [*JOB, f"zero={stage}", f"--config-dir={tmp_path / 'conf'}", "launch.nproc=2"]
    job += ["schedule=constant", "optim.learning_rate=1e-2", "tuner=full", "precision=fp32"]
    own = [*job, "optim=plain_adam"]

    def train(run: str, *overrides: str) -> list[float]:
        done = run_cli(*overrides, f"output_dir={tmp_path / run}", "run_name=one", env=ENV)
        assert done.code == 0, done.err
        assert "optimizer      Adam" in done.out + done.err
        return losses(tmp_path / run)

    whole = train("whole", *own, "export=none", "train.max_steps=3")
    assert train("halves", *own, "export=none", "train.max_steps=2") == whole[:2]
    assert train("halves", *own, "export=pt", "train.max_steps=3") == whole
    # Bias correction makes the first steps of AdamW longer.
    assert train("adamw", *job, "export=none", "train.max_steps=3")[1:] != whole[1:]

    card = (tmp_path / "halves/export-pt/README.md").read_text()
    assert "| optimizer | Adam without bias correction, betas" in card
    (file, *_) = sorted((tmp_path / "halves/checkpoint-3").glob("optimizer-*.safetensors"))
    with safe_open(file, framework="pt") as stored:
        kinds = {name.rpartition("/")[2] for name in stored.keys()}  # noqa: SIM118
    assert kinds == {"master", "square", "mean"}
    plan = json.loads((tmp_path / "halves/plan.json").read_text())
    assert plan["deepspeed"]["optimizer"]["params"]["betas"] == [0.8, 0.95]


@pytest.mark.process
def test_a_run_does_not_resume_with_another_optimizer(tmp_path: Path) -> None:
    job = [*JOB, "export=none", f"output_dir={tmp_path / 'run'}"]
    assert run_cli(*job, "optim=lion").code == 0
    refused = run_cli(*job, "train.max_steps=2")
    assert refused.code == 5
    assert "optim.kind: lion there, adamw now" in refused.err

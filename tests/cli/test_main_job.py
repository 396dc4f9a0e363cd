"""The embedded job on the real model, shortened: it learns, and the merged model is the trained
one.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support import ROOT, run, run_cli

#: The embedded job in four steps of half its rows; ``scripts/demo.sh`` runs all of it.
SHORT = [
    "train.max_steps=4",
    "train.global_batch_size=4",
    "optim.learning_rate=2e-3",
    "data.val_set_size=8",
    "train.sample_answers=false",
]


@pytest.mark.process
def test_the_embedded_model_is_unpacked_once(smollm2: Path) -> None:
    """First of all, so that the job below need not."""
    stored = load_file(smollm2 / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == 134_515_008
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


@pytest.fixture(scope="module")
def trained(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the job."""
    folder = tmp_path_factory.mktemp("main") / "run"
    done = run_cli(*SHORT, f"output_dir={folder}", timeout=600)
    assert done.code == 0, done.err + done.out
    return folder


@pytest.mark.process
def test_smollm2_learns(trained: Path) -> None:
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    held_out = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert held_out[-1] < 0.9 * held_out[0]


@pytest.mark.process
def test_its_merge_is_what_was_trained(trained: Path) -> None:
    merged = AutoModelForCausalLM.from_pretrained(trained / "merged")
    assert sum(p.numel() for p in merged.parameters()) == 134_515_008
    data = ["data.train=stdlib_docs@576", "data.val_set_size=8"]
    of_run = json.loads(run_cli("eval", "--json", f"run={trained}").out)["eval_loss"]
    of_merge = json.loads(run_cli("eval", "--json", f"base={trained}/merged", *data).out)[
        "eval_loss"
    ]
    assert of_merge == pytest.approx(of_run, rel=0.02)


@pytest.mark.process
@pytest.mark.usefixtures("started_cold")
def test_help_is_there_at_once() -> None:
    started = time.perf_counter()
    done = run_cli("--help")
    assert done.code == 0
    assert time.perf_counter() - started < 2, "torch or Hydra is imported for --help"


def test_the_readme_names_only_what_exists() -> None:
    text = (ROOT / "README.md").read_text()
    for folder in (
        path
        for path in (ROOT / "llmtune").iterdir()
        if path.is_dir() and path.name != "__pycache__"
    ):
        assert f"`llmtune/{folder.name}/`" in text
    for link in (
        "docs/results.md",
        "docs/design.md",
        "docs/dependencies.md",
        "CHANGELOG.md",
        "llmtune/config/schema.py",
    ):
        assert f"]({link})" in text
        assert (ROOT / link).is_file(), link


@pytest.mark.process
@pytest.mark.parametrize("script", ["setup", "demo", "test"])
def test_the_scripts_are_bash(script: str) -> None:
    assert run(["bash", "-n", f"scripts/{script}.sh"]).code == 0

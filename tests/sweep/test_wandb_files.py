"""The files of ``conf/sweep/`` as W&B reads them, and as its agent runs them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from llmtune.config.compose import compose_config
from llmtune.config.keys import known_keys
from llmtune.draws import Draw, generator
from tests.support import ROOT, run
from tests.track.wandb_file import read_wandb

SWEEPS: dict[str, dict[str, Any]] = {
    file.stem: yaml.safe_load(file.read_text()) for file in (ROOT / "conf" / "sweep").glob("*.yaml")
}
_PACKAGE = importlib.util.find_spec("sweeps")
#: The schema of W&B's own package. It is not imported: its requirements are older than those here.
SCHEMA = Path(str(_PACKAGE.origin)).parent / "config" / "schema.json" if _PACKAGE else None
#: What makes a run of a file short.
SMALL = {
    "model": "tiny",
    "data.train": "stdlib_docs@100",
    "data.val_set_size": 8,
    "train.max_steps": 2,
    "train.sample_answers": False,
}


def agent_command(name: str, parameters: dict[str, Any]) -> list[str]:
    """The command line that the agent makes of the file and of the values that the server sends."""
    macros = create_sweep_command_args(
        {"args": {key: {"value": value} for key, value in parameters.items()}}
    )
    macros["env"] = ["/usr/bin/env"]
    command: list[str] = []
    for part in create_sweep_command(list(SWEEPS[name]["command"])):
        command += macros[part[2:-1]] if part.startswith("${") else [part]
    return command


def sample(name: str, number: int) -> dict[str, Any]:
    """Values as the server sends them."""
    rng = generator(1, Draw.trial, number)
    found: dict[str, Any] = {}
    for key, entry in SWEEPS[name]["parameters"].items():
        if "values" in entry:
            found[key] = entry["values"][int(rng.integers(len(entry["values"])))]
        else:
            low, high, share = entry["min"], entry["max"], float(rng.random())
            is_log = entry["distribution"] == "log_uniform_values"
            found[key] = low * (high / low) ** share if is_log else low + share * (high - low)
    return found


def environment(run_id: str) -> dict[str, str]:
    """What the agent sets for a run."""
    return {
        "WANDB_SWEEP_ID": "sweep1",
        "WANDB_RUN_ID": run_id,
        "WANDB_MODE": "offline",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


def exit_codes(folder: Path) -> list[int]:
    """The exit codes that W&B was told of the starts of a run."""
    return [
        entry.exit.exit_code
        for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"))
        for entry in read_wandb(file)
        if entry.WhichOneof("record_type") == "exit"
    ]


def test_there_is_one_for_each_kind_of_search() -> None:
    assert sorted(SWEEPS) == ["classification", "full", "lora"]


@pytest.mark.parametrize("name", SWEEPS)
def test_every_swept_parameter_is_a_key_and_every_end_composes(name: str) -> None:
    sweep = SWEEPS[name]
    assert set(sweep["parameters"]) <= known_keys()
    for number in range(6):
        values = sample(name, number) | {"model": "tiny", "data.train": "a.jsonl"}
        arguments = [text for text in agent_command(name, values) if "=" in text]
        config = compose_config(arguments).config
        assert config.optim.learning_rate == values["optim.learning_rate"]
        assert config.tracker.kind == "wandb"
        assert config.train.eval_steps or config.train.eval_strategy == "epoch"
    assert sweep["metric"]["goal"] == ("maximize" if name == "classification" else "minimize")
    assert sweep["early_terminate"]["type"] == "hyperband"


@pytest.mark.skipif(SCHEMA is None, reason="the package sweeps is not installed")
@pytest.mark.parametrize("name", SWEEPS)
def test_each_passes_the_schema_of_wandbs_own_package(name: str) -> None:
    jsonschema: Any = importlib.import_module("jsonschema")
    assert SCHEMA is not None
    validator = jsonschema.Draft7Validator(json.loads(SCHEMA.read_text()))
    assert [error.message for error in validator.iter_errors(SWEEPS[name])] == []
    wrong = SWEEPS[name] | {"method": "bayesian"}
    assert list(validator.iter_errors(wrong))


@pytest.mark.process
def test_the_agents_command_line_runs(tmp_path: Path) -> None:
    values = sample("lora", 0) | SMALL
    done = run(agent_command("lora", values), cwd=tmp_path, env=environment("run1"))
    assert done.code == 0, done.out + done.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == "tiny-lora-stdlib_docs-run1", (
        "each run of a sweep has a folder of its own"
    )
    assert exit_codes(folder) == [0]


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("name", ["lora", "full"])
def test_it_runs_for_three_sampled_trials(name: str, tmp_path: Path) -> None:
    for number in range(3):
        values = sample(name, number) | SMALL
        done = run(agent_command(name, values), cwd=tmp_path, env=environment(f"run{number}"))
        assert done.code == 0, done.out + done.err
    folders = sorted((tmp_path / "runs").iterdir())
    assert [folder.name.rpartition("-")[2] for folder in folders] == ["run0", "run1", "run2"]
    assert [exit_codes(folder) for folder in folders] == [[0]] * 3


@pytest.mark.slow
@pytest.mark.process
def test_a_classifiers_runs_for_three_sampled_trials(tmp_path: Path) -> None:
    rows = "".join(f'{{"text": "row {n}", "label": "{"ab"[n % 2]}"}}\n' for n in range(200))
    (tmp_path / "rows.jsonl").write_text(rows)
    for number in range(3):
        values = sample("classification", number)
        values |= {"model": "tiny_bert", "data.train": "rows.jsonl", "data.val_set_size": 16}
        values["data.max_seq_length"] = 64
        done = run(
            agent_command("classification", values), cwd=tmp_path, env=environment(f"run{number}")
        )
        assert done.code == 0, done.out + done.err
    for folder in sorted((tmp_path / "runs").iterdir()):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        assert sum("eval_f1" in line for line in lines) >= 4, "before the first step, and 3 epochs"
        assert exit_codes(folder) == [0]


@pytest.mark.slow
@pytest.mark.process
def test_a_run_that_fails_is_a_failed_run(tmp_path: Path) -> None:
    """An agent goes by the exit code, and W&B by what the run tells it."""
    values = sample("lora", 0) | SMALL | {"optim.learning_rate": 1e30}
    values |= {"train.max_steps": 6, "train.max_grad_norm": 0}
    done = run(agent_command("lora", values), cwd=tmp_path, env=environment("run1"))
    assert done.code == 1
    assert "not finite" in done.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert exit_codes(folder) == [1]


@pytest.mark.slow
@pytest.mark.process
def test_two_agents_on_one_machine_keep_apart(tmp_path: Path) -> None:
    """Their ranks, two of each, meet at the same time."""
    run_two_agents(tmp_path, {"launch.nproc": 2}, [{}, {}])


def run_two_agents(
    tmp_path: Path, settings: dict[str, Any], variables: Sequence[Mapping[str, str]]
) -> list[Path]:
    """Runs at the same time, each with its variables; the run folders."""
    running = []
    for number, own in enumerate(variables):
        values = sample("lora", number) | SMALL | {"train.max_steps": 6} | settings
        with (tmp_path / f"log{number}").open("wb") as log:
            running.append(
                subprocess.Popen(
                    agent_command("lora", values),
                    cwd=tmp_path,
                    env={**os.environ, **environment(f"run{number}"), **own},
                    stdout=log,
                    stderr=log,
                )
            )
    codes = [process.wait(timeout=280) for process in running]
    assert codes == [0, 0], (tmp_path / "log0").read_text() + (tmp_path / "log1").read_text()
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    spans = []
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, 7))
        # Between the plan and the last record.
        spans.append(
            (
                (folder / "plan.json").stat().st_mtime,
                (folder / "metrics.jsonl").stat().st_mtime,
            )
        )
    assert max(begin for begin, _ in spans) < min(end for _, end in spans), "not at the same time"
    return folders

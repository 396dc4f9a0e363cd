"""Memory that really runs out: a run goes down the ladder by itself, from its last checkpoint, to
the same loss curve.
"""

from __future__ import annotations

import bisect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import Finished, losses, run, run_cli

#: 50 M parameters, all trained: 0.8 GB of states without offload, 0.2 GB with the optimizer on
#: NVMe.
JOB = [
    "model=tiny",
    "model.config.hidden_size=768",
    "model.config.intermediate_size=3072",
    "tuner=full",
    "model.config.num_hidden_layers=4",
    "model.config.num_attention_heads=12",
    "model.config.num_key_value_heads=12",
    "model.config.head_dim=64",
    "model.config.vocab_size=8192",
    "model.config.tie_word_embeddings=false",
    "data.max_seq_length=256",
    "data.overlong=truncate",
    "train.global_batch_size=2",
    "train.max_steps=3",
    *("train.save_steps=3", "train.sample_answers=false", "train.eval_max_rows=8", "export=none"),
]
#: On top of what a process has before it loads a model: enough to load this one, too little for its
#: first step.
FOR_THE_FIRST_STEP = 1070

#: 126 M parameters, started for real: such a rank has 2.2 GB of address space before it loads
#: anything, most of it stacks of threads.
LARGE_JOB = [
    *(
        text
        for text in JOB
        if not text.startswith(("model.config.hidden", "model.config.inter", "model.config.num"))
    ),
    "model.config.hidden_size=1280",
    "model.config.intermediate_size=5120",
    "model.config.num_hidden_layers=4",
    "model.config.num_attention_heads=20",
    "model.config.num_key_value_heads=20",
    "train.max_steps=4",
    *("train.save_steps=2", "train.eval_max_rows=64"),
]
#: From too much downwards: one of them is too little for the optimizer's moments beside weights and
#: gradients. Which one, the threads of this machine decide.
AT_THE_FIRST_STEP = [[f"launch.memory_limit={mib}MiB"] for mib in range(3750, 2400, -150)]
#: One of them is enough for the steps, and too little for a large evaluation beside the moments; it
#: comes after the checkpoint of step 2.
AFTER_A_CHECKPOINT = [
    [f"launch.memory_limit={mib}MiB", "train.eval_steps=3", "train.per_device_eval_batch_size=64"]
    for mib in range(4700, 3000, -150)
]


def train(job: list[str], folder: Path, *overrides: str) -> Finished:
    return run_cli(
        *job,
        *overrides,
        f"output_dir={folder}",
        f"offload.nvme_path={folder.parent}/nvme",
        timeout=900,
    )


def plan(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "plan.json").read_text()))


def check_descent(done: Finished, folder: Path, phase: str, curve: list[float]) -> None:
    """It ran out of memory in this phase, took the rung with the optimizer on NVMe, and came to the
    same losses.
    """
    assert done.code == 0, done.out[-1500:] + done.err
    assert "taking the next rung: " in done.out
    found = plan(folder)
    assert found["placement"]["optimizer"] == "nvme"
    assert found["history"][0]["candidate"]["optimizer"] == "none"
    assert found["history"][0]["phase"] == phase
    assert found["history"][0]["peak_bytes"] > 500e6
    assert losses(folder) == pytest.approx(curve, abs=2e-3)
    assert not list((folder.parent / "nvme").iterdir()), "swap files are left"


@pytest.fixture(scope="module")
def limit() -> str:
    """Too little memory for the first step."""
    status = run([sys.executable, "-c", "print(open('/proc/self/status').read())"]).out
    found = re.search(r"VmData:\s+(\d+) kB", status)
    assert found is not None
    return f"launch.memory_limit={int(found[1]) // 1024 + FOR_THE_FIRST_STEP}MiB"


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that has all the memory."""
    folder = tmp_path_factory.mktemp("unlimited")
    done = train(JOB, folder / "run")
    assert done.code == 0, done.err
    return losses(folder / "run")


@pytest.mark.process
def test_a_run_that_runs_out_of_memory_finishes_lower_with_the_same_curve(
    limit: str, curve: list[float], tmp_path: Path
) -> None:
    done = train(JOB, tmp_path / "run", limit)
    check_descent(done, tmp_path / "run", "step", curve)


@pytest.mark.process
@pytest.mark.slow
def test_an_explicit_placement_is_not_left(limit: str, curve: list[float], tmp_path: Path) -> None:
    refused = train(JOB, tmp_path / "run", limit, "offload=none")
    assert refused.code == 3, refused.out + refused.err
    for part in (
        "out of host memory in step",
        "offload=none was asked for",
        "offload=auto",
        "optimizer_nvme",
    ):
        assert part in refused.err
    # What was tried is remembered: the next start with offload=auto does not try it again.
    again = train(JOB, tmp_path / "run", limit, "offload=auto")
    assert again.code == 0, again.out[-1500:] + again.err
    assert "ran out of memory before" in again.out
    assert losses(tmp_path / "run") == pytest.approx(curve, abs=2e-3)


def find_first_too_little(place: Path, every: list[list[str]], phase: str) -> tuple[Path, Finished]:
    """The run of the largest limit under which memory runs out in this phase; saves and evaluations
    may come first.
    """
    runs: dict[int, Finished] = {}

    def runs_out(number: int) -> bool:
        runs[number] = runs.get(number) or train(
            LARGE_JOB, place / str(number) / "run", *every[number]
        )
        return bool(runs[number].code or plan(place / str(number) / "run")["history"])

    number = bisect.bisect_left(range(len(every)), True, key=runs_out)
    while runs_out(number) and not runs[number].code:
        if plan(place / str(number) / "run")["history"][0]["phase"] == phase:
            break
        number += 1
    return place / str(number) / "run", runs[number]


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.usefixtures("started_cold")
def test_a_large_run_does_so_too_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    unlimited = train(LARGE_JOB, tmp_path / "unlimited")
    assert unlimited.code == 0, unlimited.err
    whole = losses(tmp_path / "unlimited")
    for name, phase, every in (
        ("first", "step", AT_THE_FIRST_STEP),
        ("later", "evaluate", AFTER_A_CHECKPOINT),
    ):
        folder, done = find_first_too_little(tmp_path / name, every, phase)
        check_descent(done, folder, phase, whole)
    assert plan(folder)["history"][0]["step"] == 3

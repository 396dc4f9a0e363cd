"""``python -m llmtune`` on two pretend GPUs, as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import pytest

from llmtune.data.store.vocabulary import embedding_rows
from llmtune.errors import DataError, DoesNotFitError
from tests.data.test_vocabulary import add_token, write_rows
from tests.run.test_fallback import JOB as LARGE_JOB
from tests.support import ROOT, TINY, Finished, largest_difference, losses, run, run_cli

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("pretend_gpu")]

JOB = [
    *TINY,
    "tuner=full",
    "zero=3",
    "precision=fp32",
    "model.attn_implementation=eager",
    "data.packing=true",
    "train.global_batch_size=4",
    "train.max_steps=6",
    "train.save_steps=2",
    "train.eval_max_rows=8",
    *("launch.nproc=2", "export=none", "optim.learning_rate=1e-3", "data.max_seq_length=512"),
]


def python_path(first: Path) -> str:
    """With what finds this llmtune, where that is not the one that is installed."""
    return os.pathsep.join(filter(None, (str(first), os.environ.get("PYTHONPATH"))))


GPUS = {"PYTHONPATH": python_path(ROOT / "tests" / "cuda" / "inside"), "PRETEND_DEVICES": "2"}
ON_GPUS = "hardware.accelerator=cuda"


def on_gpus(*arguments: str, **more: str) -> Finished:
    return run_cli(*arguments, env={**GPUS, **more}, timeout=200)


def evaluations(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same job without a GPU."""
    folder = tmp_path_factory.mktemp("cpu") / "run"
    done = run_cli(*JOB, f"output_dir={folder}")
    assert done.code == 0, done.err
    return folder


@pytest.mark.slow
def test_a_run_with_the_optimizer_on_the_host_is_that_of_a_cpu(
    on_cpu: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    done = on_gpus(
        *JOB, ON_GPUS, "offload=optimizer_cpu", "train.sample_answers=true", f"output_dir={folder}"
    )
    assert done.code == 0, done.err
    assert "2 GPUs NVIDIA A100-SXM4-80GB" in done.out
    assert largest_difference(losses(folder), losses(on_cpu)) < 1e-5
    assert largest_difference(evaluations(folder), evaluations(on_cpu)) < 1e-5
    measured = on_gpus("eval", f"run={folder}", ON_GPUS, "--json", "train.eval_max_rows=8")
    assert measured.code == 0, measured.err
    # In one process, over all held-out rows.
    assert json.loads(measured.out.splitlines()[-1])["eval_loss"] == pytest.approx(
        evaluations(on_cpu)[-1], abs=0.1
    )
    talk = run(
        [sys.executable, "-m", "llmtune", "chat", f"run={folder}", ON_GPUS],
        env=GPUS,
        stdin="hello\n",
    )
    assert talk.code == 0, talk.err


#: Tells when ranks are started, and when the plan for them is there.
_TELLING = """
import sys
from llmtune.cli import main
from llmtune.plan import resolve as planner
from llmtune.run import ranks_ahead
real = ranks_ahead.RankGroup, planner.resolve_ladder
def start(command, world_size, ahead):
    print(f"{world_size} rank(s) started", flush=True)
    return real[0](command, world_size, ahead)
def plan(*arguments, **named):
    made = real[1](*arguments, **named)
    print("planned", flush=True)
    return made
ranks_ahead.RankGroup, planner.resolve_ladder = start, plan
sys.exit(main.main())
"""


@pytest.mark.parametrize(
    ("counted", "told"),
    [
        pytest.param("2", ["2 rank(s) started", "planned"], marks=pytest.mark.slow),
        ("1", ["1 rank(s) started", "planned", "2 rank(s) started"]),
    ],
)
def test_ranks_are_started_before_the_plan_and_anew_if_it_is_for_others(
    counted: str, told: list[str], on_cpu: Path, tmp_path: Path
) -> None:
    job = [text for text in JOB if not text.startswith("launch.nproc")]
    command = [sys.executable, "-c", _TELLING, *job, ON_GPUS, f"output_dir={tmp_path}/run"]
    done = run(command, env={**GPUS, "PRETEND_NVML": counted}, timeout=200)
    assert done.code == 0, done.err
    assert [line for line in done.out.splitlines() if line in (*told, "planned")] == told
    assert largest_difference(losses(tmp_path / "run"), losses(on_cpu)) < 1e-5


def test_a_run_that_was_stopped_and_killed_goes_on_to_the_same_losses(
    on_cpu: Path, tmp_path: Path
) -> None:
    """With copies of its checkpoints elsewhere; after the kill they are all that is left."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "llmtune", *JOB, ON_GPUS, f"output_dir={folder}"]
    command += [f"checkpoint.mirror={tmp_path / 'mirror'}", "run_name=stopped"]
    for number, kind, code in ((2, signal.SIGTERM, 75), (4, signal.SIGKILL, -signal.SIGKILL)):
        started = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **GPUS}, stdout=DEVNULL, stderr=DEVNULL
        )
        place = folder if kind == signal.SIGTERM else tmp_path / "mirror" / "stopped"
        deadline = time.monotonic() + 120
        while (
            not (place / f"checkpoint-{number}" / "COMPLETE").exists()
            and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        started.send_signal(kind)
        assert started.wait(60) == code
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    done = run(command, env=GPUS)
    assert done.code == 0, done.err
    assert "fetching" in done.out
    assert largest_difference(losses(folder), losses(on_cpu)) < 1e-5


def test_a_device_that_is_full_leads_to_the_next_rung(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # 50 M parameters: weights and gradients fit, moments do not. In fp32, since the pretend GPU
    # multiplies 16-bit matrices as slowly as the CPU that it is.
    job = [*LARGE_JOB, "precision=fp32", ON_GPUS, "launch.nproc=1", "launch.memory_limit=680MB"]
    done = on_gpus(*job, f"output_dir={folder}")
    assert done.code == 0, done.out[-1500:] + done.err
    plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    assert (plan["history"][0]["pool"], plan["history"][0]["candidate"]["optimizer"]) == (
        "device",
        "none",
    )
    assert plan["placement"]["optimizer"] == "cpu"
    assert plan["history"][0]["peak_bytes"] > 300e6
    assert "out of device memory in " in done.out


def test_pinned_memory_that_runs_out_is_the_hosts(tmp_path: Path) -> None:
    """CUDA hands it out, and says "CUDA error: out of memory"; a rung with more on the host would
    need more of it.
    """
    folder = tmp_path / "run"
    job = [*JOB, ON_GPUS, "launch.nproc=1", "offload=optimizer_cpu", f"output_dir={folder}"]
    done = on_gpus(*job, PRETEND_PINNED="100000")
    assert done.code == DoesNotFitError.exit_code, done.out[-1500:] + done.err
    assert "out of host memory in load (rank 0): CUDA error: out of memory" in done.err
    assert [
        entry["pool"] for entry in json.loads((folder / "plan.json").read_text())["history"]
    ] == ["host"]


def test_a_token_beyond_the_embedding_is_refused_before_the_gpus_see_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    """They would end the ranks with a failed assertion, again after every restart, and name no
    row.
    """
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    tokenizer = add_token(model)
    tokenizer.save_pretrained(model)
    file = write_rows(tmp_path, tokenizer, 17)
    job = [
        *JOB[1:],
        f"model.name_or_path={model}",
        f"data.train={file}",
        f"output_dir={tmp_path / 'run'}",
    ]
    done = on_gpus(*job, ON_GPUS)
    assert done.code == DataError.exit_code, done.out[-1500:] + done.err
    assert f"{file}:17: token {embedding_rows(model)} (" in done.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("given", [{}, {"PYTORCH_ALLOC_CONF": "garbage_collection_threshold:0.8"}])
def test_allocator_settings_stand_before_torch_is_imported(
    given: dict[str, str], tmp_path: Path
) -> None:
    """Under a launcher of others, whose processes are ranks from the beginning."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, os\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('PYTORCH_CUDA_ALLOC_CONF'), file=open(os.environ['SEEN'], 'w'), flush=True)\n"  # noqa: E501
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    place = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29999",
    }
    place["TORCHELASTIC_RUN_ID"] = "none"
    environment = {
        **os.environ,
        **place,
        **given,
        "PYTHONPATH": python_path(tmp_path),
        "LLMTUNE_TEST_START": "cold",
    }
    environment["SEEN"] = str(tmp_path / "seen")
    environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    command = [sys.executable, "scripts/train.py", "model=tiny", f"output_dir={tmp_path}/run"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    seen = (tmp_path / "seen").read_text().strip()
    assert seen == (
        "None" if given else "expandable_segments:True,pinned_max_round_threshold_mb:16"
    ), done.stderr

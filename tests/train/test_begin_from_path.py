"""``resume_from_checkpoint=PATH`` begins a run once; the same command again goes on from what the
run has saved since.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmtune.checkpoint.mirror import Mirror
from llmtune.config.schema import Config
from llmtune.errors import CheckpointError
from llmtune.storage import layout, remote
from llmtune.train.resume import named_origin, resume_point
from llmtune.train.run_folder import RunFolder
from tests.support import ROOT, TINY, losses, run_cli
from tests.train.test_resume import config_of, damage, make


def remember(run: Path, origin: Path | str, step: int) -> None:
    """What ``begin`` writes."""
    (run / layout.PLAN).write_text(
        json.dumps({"began_from": {"origin": named_origin(str(origin)), "step": step}})
    )


def point(
    run: Path, wanted: Path | str, said: list[str] | None = None, *overrides: str
) -> Path | None:
    config: Config = config_of(f"resume_from_checkpoint={wanted}", *overrides)
    notes: list[str] = [] if said is None else said
    return resume_point(RunFolder(run), config, "r", notes.append)


def test_a_newer_checkpoint_of_the_own_folder_goes_on(tmp_path: Path) -> None:
    config, said = config_of(), list[str]()
    path, run = make(tmp_path / "a", 8, config), tmp_path / "b"
    run.mkdir()
    assert point(run, path) == path
    make(run, 4, config)
    assert point(run, path) == path, "an older one does not"
    newer = make(run, 12, config)
    assert point(run, path, said) == newer
    assert "it has reached checkpoint-12: resuming from there" in said[-1]
    newest = make(run, 16, config)
    assert point(run, path) == newest
    damage(newest)
    assert point(run, path) == newer


def test_what_a_run_began_from_need_not_stay(tmp_path: Path) -> None:
    config = config_of()
    path, run = make(tmp_path / "a", 8, config), tmp_path / "b"
    own = make(run, 8, config)
    remember(run, path, 8)
    shutil.rmtree(path)
    assert point(run, path) == own, "stopped before its first own step"
    later = make(run, 10, config)
    assert point(run, f"{path.parent}/../a/checkpoint-8") == later, "the same place in other words"
    with pytest.raises(CheckpointError, match="checkpoint-6"):
        point(run, path.with_name("checkpoint-6"))


def test_a_checkpoint_of_the_own_folder_is_gone_back_to_once(tmp_path: Path) -> None:
    config = config_of()
    back, newer = make(tmp_path, 8, config), make(tmp_path, 12, config)
    assert point(tmp_path, back) == back
    remember(tmp_path, back, 8)
    newer.rename(tmp_path / "superseded-checkpoint-12")
    assert point(tmp_path, back) == back
    later = make(tmp_path, 10, config)
    assert point(tmp_path, back) == later
    shutil.rmtree(back)
    assert point(tmp_path, back) == later, "it was pruned"


def test_a_lost_folder_comes_back_from_the_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.0)
    url = f"checkpoint.mirror={tmp_path / 'elsewhere'}"
    config = config_of(url)
    path, run = make(tmp_path / "a", 8, config), tmp_path / "b"
    copies = Mirror(str(tmp_path / "elsewhere"), "r", print)
    copies.put(make(run, 10, config), {"checkpoint-10"})
    assert copies.finish(30) == []
    shutil.rmtree(run)
    run.mkdir()
    assert point(run, path, None, url) == run / "checkpoint-10"


#: 12 steps that are slow enough to be stopped in.
JOB = [
    *TINY,
    "precision=fp32",
    "train.save_steps=4",
    "train.max_steps=12",
    "train.eval_steps=4",
    "launch.nproc=1",
]
JOB += ["export=none", "tuner.lora_dropout=0.1"]


@pytest.mark.process
def test_a_checkpoint_of_the_last_step_is_published(tmp_path: Path) -> None:
    job = [*JOB, "train.max_steps=2", "train.save_steps=2"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_cli(*job, f"output_dir={first}").code == 0
    command = [*job, f"output_dir={second}", f"resume_from_checkpoint={first}/checkpoint-2"]
    done = run_cli(*command)
    assert done.code == 0, done.err
    assert f"finished: {second} is at step 2" in done.out
    for name in ("adapter/adapter_model.safetensors", "checkpoint-2/adapter_model.safetensors"):
        assert (second / name).read_bytes() == (
            first / "adapter/adapter_model.safetensors"
        ).read_bytes()
    shutil.rmtree(first)
    again = run_cli(*command)
    assert (again.code, f"finished: {second} is at step 2" in again.out) == (0, True)


@pytest.mark.process
@pytest.mark.slow
def test_a_job_that_is_queued_again_after_every_stop_ends_with_the_losses_of_the_undisturbed_one(
    tmp_path: Path,
) -> None:
    first, whole, stopped = tmp_path / "first", tmp_path / "whole", tmp_path / "stopped"
    assert run_cli(*JOB, "train.max_steps=4", f"output_dir={first}").code == 0
    # Schedules run to the end of the run: the first one's is made longer.
    path = f"resume_from_checkpoint={first}/checkpoint-4"
    job = [*JOB, "train.max_steps=24", path]
    assert run_cli(*job, f"output_dir={whole}").code == 0
    draw = random.Random(11)
    stops, steps_when_stopped = 0, list[int]()
    for _ in range(12):
        code = start_and_stop([*job, f"output_dir={stopped}"], stopped, draw if stops < 5 else None)
        if code == 0:
            break
        assert code == 75
        stops += 1
        steps_when_stopped.append(len(losses(stopped)))
    assert stops == 5
    assert steps_when_stopped == sorted(steps_when_stopped), "no stop throws steps away"
    assert losses(stopped) == losses(whole)
    assert len(losses(stopped)) == 20
    assert not list(stopped.glob("superseded-*"))


def start_and_stop(command: list[str], run: Path, draw: Any) -> int:
    """Start, and send SIGTERM after one to four more steps; with ``draw=None`` let it end."""
    before = len(losses(run)) if (run / "metrics.jsonl").is_file() else 0
    process = subprocess.Popen(
        [sys.executable, "-m", "llmtune", *command],
        cwd=ROOT,
        env=dict(os.environ),
        stdout=subprocess.DEVNULL,
    )
    if draw is not None:
        wanted, deadline = before + draw.randint(1, 3), time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if (run / "metrics.jsonl").is_file() and len(losses(run)) >= wanted:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.01)
    return process.wait(timeout=240)

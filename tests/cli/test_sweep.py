"""``sweep`` as a user starts it: real trainings of the tiny model, stopped, killed and gone on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmtune.cli.main import main
from llmtune.config.compose import compose_config
from llmtune.sweep.settings import resolve_sweep
from llmtune.sweep.space import Parameter
from llmtune.sweep.trial import Trial, TrialEnd, TrialState
from tests.support import ROOT, TINY, Finished, losses, run_cli
from tests.sweep.fakes import FakeRunner, make_loop, make_study

JOB = [
    *("sweep", *TINY, "data.train=stdlib_docs@40", "data.val_set_size=8", "launch.nproc=1"),
    *("train.max_steps=4", "train.eval_steps=2", "train.save_steps=2"),
    *("hparams_search.space.tuner.lora_r.choices=[4,8]", "hparams_search.pruner_startup_trials=1"),
    "hparams_search.space.optim.learning_rate={low: 1e-5, high: 1e-1, log: true}",
]


SPACE = [
    Parameter(key="tuner.lora_r", choices=(4, 8)),
    Parameter(key="optim.learning_rate", low=1e-5, high=1e-1, is_log=True),
]


def trials_of(folder: Path) -> list[Trial]:
    return make_study(folder, SPACE).list_trials()


def sweep(folder: Path, *more: str) -> Finished:
    return run_cli(*JOB, f"output_dir={folder}", *more)


@pytest.mark.process
def test_trials_are_trained_and_the_best_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    done = sweep(folder, "hparams_search.trials=2", "--json")
    assert done.code == 0, done.err
    values: dict[str, Any] = json.loads(done.out)
    assert [trial["number"] for trial in values["trials"]] == [0, 1]
    best = values["best"]
    for trial in values["trials"]:
        run = Path(trial["folder"])
        assert len(losses(run)) == 4 or trial["state"] == "pruned"
        config = (run / "config.yaml").read_text()
        assert f"lora_r: {trial['settings']['tuner.lora_r']}\n" in config
        assert not (run / "merged").exists()
    last = [json.loads(line) for line in (Path(best["folder"]) / "metrics.jsonl").open()][-1]
    assert best["eval_loss"] == last["eval_loss"]
    # Again, it has nothing to do, so that no process is started.
    job = [*JOB, f"output_dir={folder}", "hparams_search.trials=2"]
    assert main(job) == 0
    out = capfd.readouterr().out
    assert f"best: trial {best['number']} with eval_loss {best['eval_loss']:.6g}" in out
    assert f"  folder    {folder}/trial-000{best['number']}" in out
    assert main([*job, "train.max_steps=6"]) == 5
    assert "train.max_steps: 4 there, 6 now" in capfd.readouterr().err


def start(folder: Path, *more: str) -> subprocess.Popen[bytes]:
    with (folder.parent / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "llmtune", *JOB, f"output_dir={folder}", *more],
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )


def wait_for(file: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a trial has come so far."""
    deadline = time.monotonic() + 240
    while not (file.is_file() and text in file.read_text()):
        assert process.poll() is None, "it has ended before"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_six_trials_killed_in_the_middle_and_started_again(
    number: signal.Signals, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    process = start(folder, "hparams_search.trials=6", "report.write=true")
    wait_for(folder / "trial-0002" / "metrics.jsonl", '"step": 3', process)
    os.kill(process.pid, number)
    code = process.wait(timeout=120)
    before = trials_of(folder)
    stopped = before[-1]
    log = (tmp_path / "log").read_text()
    if number is signal.SIGINT:
        assert code == 75
        assert "the sweep is stopped; this command goes on: python -m llmtune sweep" in log
    assert (stopped.number, stopped.state) == (2, TrialState.unfinished)

    done = sweep(folder, "hparams_search.trials=6", "report.write=true")
    assert done.code == 0, done.out + done.err
    assert "trial 2 goes on" in done.out
    after = trials_of(folder)
    assert [trial.number for trial in after] == list(range(6))
    assert after[:2] == before[:2]
    assert after[2].values == stopped.values
    assert len({str(trial.values) for trial in after}) == 6
    finished = [trial for trial in after if trial.state is TrialState.finished]
    best = min(finished, key=lambda trial: trial.value or 9)
    assert f"best: trial {best.number} with eval_loss {best.value:.6g}" in done.out
    assert sorted(entry.name for entry in folder.glob("trial-*")) == [
        f"trial-000{number}" for number in range(6)
    ]
    assert f"trial-000{best.number}" in (folder / "report.html").read_text()

    if number is signal.SIGINT:
        return
    # A sweep that nothing stopped has the same trials with the same values.
    whole = tmp_path / "whole"
    assert sweep(whole, "hparams_search.trials=6").code == 0
    assert [(t.values, t.state, t.value) for t in trials_of(whole)] == [
        (t.values, t.state, t.value) for t in after
    ]


@pytest.mark.slow
@pytest.mark.process
def test_a_bad_trial_is_ended_early_and_one_that_fails_is_recorded(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    done = run_cli(
        *(text for text in JOB if not text.startswith(("hparams_search.space", "train.max_steps"))),
        "hparams_search.space.optim.learning_rate.choices=[0.01,1e-7,1e30]",
        *("hparams_search.sampler=grid", "train.max_steps=60", f"output_dir={folder}", "--json"),
    )
    assert done.code == 0, done.err
    good, bad, failed = json.loads(done.out)["trials"]
    assert [trial["state"] for trial in (good, bad, failed)] == ["finished", "pruned", "failed"]
    assert len(losses(Path(good["folder"]))) == 60
    assert 2 <= len(losses(Path(bad["folder"]))) < 60
    assert not list(Path(bad["folder"]).glob("checkpoint-*")), "nothing goes on from them"
    assert "not finite" in failed["reason"]


def test_many_values_lead_to_this_verb(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in (["-m", "tuner.lora_r=8,16"], ["--multirun"]):
        assert main(arguments) == 2
        assert "python -m llmtune sweep hparams_search=lora" in capfd.readouterr().err


def test_a_folder_with_something_else_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").touch()
    assert main([*JOB, f"output_dir={tmp_path}"]) == 5
    assert "is not empty and holds no sweep (notes.txt)" in capfd.readouterr().err


@pytest.mark.parametrize("verb", [[], ["train"], ["plan"]])
def test_verbs_of_one_run_do_not_pass_over_a_search(
    verb: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*verb, "model=tiny", "hparams_search=lora"]) == 2
    assert "does not read hparams_search: take the verb sweep" in capfd.readouterr().err


def test_report_writes_the_page_of_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llmtune.report.write.read_script", lambda _: "the script")
    settings = resolve_sweep(compose_config([*JOB[1:], f"output_dir={tmp_path}"]), None)
    study = make_study(tmp_path, SPACE)
    done = TrialEnd(state=TrialState.finished, value=2.5)
    make_loop(study, FakeRunner(lambda _: done), 2).run()
    assert main(["report", str(tmp_path)]) == 5
    assert "holds a sweep that has not begun" in capfd.readouterr().err
    study.write_record(settings.to_record())
    assert main(["report", str(tmp_path), "--json"]) == 0
    values = json.loads(capfd.readouterr().out)
    assert values["best"]["number"] == 0
    assert values["state"] == "2 of 20 trials"
    assert values["best"]["command"].startswith("python -m llmtune train model=tiny")
    assert "the script" in (tmp_path / "report.html").read_text()
    assert main(["report", str(tmp_path), f"output={tmp_path}/x.html"]) == 0
    assert "best: trial 0 with eval_loss 2.5" in capfd.readouterr().out
    assert (tmp_path / "x.html").is_file()

"""Ctrl-C, SIGTERM and SIGHUP end every verb in seconds, at any moment, with the documented exit
code and no process left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.interrupts import (
    Interrupt,
    draw_interrupts,
    judge_interrupt,
    record,
    run_interrupted,
)
from tests.processes import cold
from tests.support import ROOT

pytestmark = pytest.mark.process

VERBS = ("train", "data", "export", "eval", "predict", "chat", "plan", "verify", "doctor")
ROWS = 60_000


@dataclass(frozen=True)
class Setting:
    """A finished run, and rows that take seconds to tokenize."""

    folder: Path

    def arguments(self, verb: str, own: Path) -> list[str]:
        """A command whose work takes a while, in an empty folder of its own."""
        cache = f"paths.cache_dir={self.folder / 'cache'}"
        on_run = [verb, f"run={self.folder / 'run'}", cache]
        rows = [f"data.train={self.folder / 'rows.jsonl'}", f"paths.cache_dir={own / 'cache'}"]
        short = [
            "train.max_steps=3",
            "launch.nproc=1",
            "data.val_set_size=0",
            "train.sample_answers=false",
        ]
        commands = {
            "train": [
                "train",
                "model=tiny",
                *rows,
                *short,
                "export=safetensors",
                f"output_dir={own / 'out'}",
            ],
            "data": ["data", "model=tiny", *rows, f"output_dir={own / 'out'}"],
            "export": [*on_run, "export=safetensors", f"output_dir={own / 'out'}"],
            "eval": on_run,
            "predict": [
                *on_run,
                f"predict.input={self.folder / 'rows.jsonl'}",
                f"predict.output={own / 'out.jsonl'}",
                "predict.max_new_tokens=4",
            ],
            "chat": [*on_run, "chat.prompt=What is a list?", "chat.max_new_tokens=200"],
            "plan": ["plan", "model=tiny", cache],
            "verify": on_run,
            "doctor": ["doctor", cache],
        }
        return commands[verb]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("interrupts")
    with (folder / "rows.jsonl").open("w") as out:
        for number in range(ROWS):
            row = {
                "instruction": f"question {number} " + "w " * (number % 40),
                "output": "v " * (1 + number % 30),
            }
            out.write(json.dumps(row) + "\n")
    return Setting(folder)


@pytest.fixture(scope="module")
def trained(setting: Setting) -> Setting:
    small = [
        "data.train=stdlib_docs@200",
        "train.max_steps=2",
        "launch.nproc=1",
        "data.max_seq_length=256",
    ]
    places = [f"output_dir={setting.folder / 'run'}", f"paths.cache_dir={setting.folder / 'cache'}"]
    command = [sys.executable, "-m", "llmtune", "model=tiny", *small, "export=none", *places]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return setting


@pytest.fixture(scope="module")
def undisturbed(trained: Setting) -> Callable[[str], tuple[float, int]]:
    """Seconds and exit code of a verb that nobody disturbs."""
    known: dict[str, tuple[float, int]] = {}

    def find(verb: str) -> tuple[float, int]:
        if verb not in known:
            own = trained.folder / f"undisturbed-{verb}"
            own.mkdir()
            started = time.monotonic()
            command = [sys.executable, "-m", "llmtune", *trained.arguments(verb, own)]
            code = subprocess.run(
                command, cwd=ROOT, check=False, capture_output=True, stdin=subprocess.DEVNULL
            )
            known[verb] = time.monotonic() - started, code.returncode
        return known[verb]

    return find


@pytest.mark.slow
@pytest.mark.parametrize("trial", draw_interrupts(VERBS), ids=lambda trial: trial.name)
def test_every_verb_ends_at_every_moment(
    trial: Interrupt,
    trained: Setting,
    undisturbed: Callable[[str], tuple[float, int]],
    tmp_path: Path,
) -> None:
    with cold():
        seconds, code = undisturbed(trial.verb)
        outcome = run_interrupted(
            trained.arguments(trial.verb, tmp_path),
            tmp_path,
            trial,
            lambda *_: time.sleep(trial.moment * seconds),
        )
    wrong = judge_interrupt(trial, outcome, code)
    if file := os.environ.get("LLMTUNE_INTERRUPT_TABLE"):
        record(Path(file), trial, outcome, wrong)
    assert not wrong, outcome


def until_it_tokenizes(console: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while b"tokenizing" not in console.read_bytes():
        assert process.poll() is None, console.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("verb", "number", "times", "target"),
    [
        ("data", signal.SIGINT, 2, "group"),
        ("data", signal.SIGTERM, 1, "main process"),
        ("train", signal.SIGINT, 1, "group"),
        pytest.param("data", signal.SIGINT, 1, "group", marks=pytest.mark.slow),
        pytest.param("data", signal.SIGTERM, 2, "group", marks=pytest.mark.slow),
        pytest.param("train", signal.SIGTERM, 1, "main process", marks=pytest.mark.slow),
        pytest.param("train", signal.SIGHUP, 1, "group", marks=pytest.mark.slow),
    ],
)
def test_tokenizing_ends_with_all_its_workers(
    verb: str, number: signal.Signals, times: int, target: str, setting: Setting, tmp_path: Path
) -> None:
    trial = Interrupt(verb=verb, moment=0.5, number=number, times=times, target=target)
    outcome = run_interrupted(
        setting.arguments(verb, tmp_path), tmp_path, trial, until_it_tokenizes
    )
    assert not judge_interrupt(trial, outcome, 0), outcome
    assert outcome.code == (75 if verb == "train" else 128 + number)
    said = "the same command starts again" if verb == "train" else f"ended by {number.name}"
    assert said in outcome.console
    assert "Traceback" not in outcome.console

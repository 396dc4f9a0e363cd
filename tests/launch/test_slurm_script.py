"""``scripts/slurm.sh``: signals reach what it started, and a job is queued again for as long as
that gets it on.

``srun``, ``scontrol`` and, in most tests, Python are stand-ins on PATH; Slurm itself is not there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.processes import MARK
from tests.support import ROOT, TINY, losses

pytestmark = pytest.mark.process

SCRIPT = ROOT / "scripts" / "slurm.sh"

#: One task after the other gets the variables that Slurm sets in a step; signals go on to all, the
#: highest code comes back.
SRUN = """
    import os, signal, subprocess, sys
    assert sys.argv[1] == "--kill-on-bad-exit=1", sys.argv
    count = int(os.environ["SLURM_NTASKS"])
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_NODELIST": "localhost"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": str(count), "SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1"}
    tasks = []
    def forward(number, frame):
        for task in tasks:
            task.send_signal(number)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, forward)
    for number in range(count):
        own = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
        tasks.append(subprocess.Popen(sys.argv[2:], env={**os.environ, **step, **own}))
    codes = [task.wait() for task in tasks]
    sys.exit(max(128 - code if code < 0 else code for code in codes))
"""  # noqa: E501

#: ``python -m llmtune``: notes how it was called, then ends as ``PLAY`` says; ``save`` waits for a
#: signal.
PYTHON = """
    import json, os, signal, sys, time
    from pathlib import Path
    run = Path(next(a for a in sys.argv if a.startswith("output_dir=")).partition("=")[2])
    rank = os.environ.get("SLURM_PROCID", "-")
    def save(number, frame):
        (run.parent / f"heard-{rank}").write_text(signal.Signals(number).name)
        time.sleep(0.3)
        sys.exit(75)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, save)
    (run.parent / f"called-{rank}").write_text(json.dumps(sys.argv[1:]))
    (run.parent / f"cores-{rank}").write_text(os.environ.get("SRUN_CPUS_PER_TASK", ""))
    play = json.loads(os.environ["PLAY"])
    for step in play.get("checkpoints", []):
        (run / f"checkpoint-{step}").mkdir(parents=True, exist_ok=True)
        (run / f"checkpoint-{step}" / "COMPLETE").touch()
    end = play["end"]
    if end == "save":
        (run.parent / f"ready-{rank}").touch()
        time.sleep(60)
    elif end < 0:
        if end != -9:
            signal.signal(-end, signal.SIG_DFL)
        os.kill(os.getpid(), -end)
    sys.exit(end)
"""


class Slurm:
    """A job, as Slurm starts it again and again."""

    def __init__(self, folder: Path):
        self.folder, self.run = folder, folder / "run"
        tools = folder / "tools"
        tools.mkdir()
        requeue = f'#!/bin/sh\necho "$@" >> {folder}/requeued\n'
        stand_ins = {"srun": SRUN, "pretend-python": PYTHON}
        texts = {
            name: f"#!{sys.executable} -S\n{textwrap.dedent(text)}"
            for name, text in stand_ins.items()
        }
        for name, text in {**texts, "scontrol": requeue}.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHON": "pretend-python",
            "SLURM_JOB_ID": "4711",
        }

    def start(self, *arguments: str, tasks: int = 1, **play: object) -> subprocess.Popen[bytes]:
        """``play`` says what the pretended Python does."""
        own = {"SLURM_NTASKS": str(tasks), "PLAY": json.dumps(play)}
        command = ["bash", str(SCRIPT), f"output_dir={self.run}", *arguments]
        return subprocess.Popen(
            command, cwd=ROOT, env={**self.environment, **own}, start_new_session=True
        )

    def end(self, *arguments: str, tasks: int = 1, **play: object) -> int:
        """Exit code of a start."""
        return self.start(*arguments, tasks=tasks, **play).wait(30)

    @property
    def requeued(self) -> int:
        """How often the job was queued again."""
        file = self.folder / "requeued"
        lines = file.read_text().splitlines() if file.exists() else []
        assert set(lines) <= {"requeue 4711"}
        return len(lines)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, files
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "code", "requeued"), [(signal.SIGUSR1, 0, 1), (signal.SIGTERM, 75, 0)]
)
@pytest.mark.parametrize("tasks", [1, 2])
def test_a_signal_to_the_batch_script_reaches_every_rank(
    tasks: int, number: signal.Signals, code: int, requeued: int, slurm: Slurm
) -> None:
    """A job that was canceled is not queued again."""
    ranks = ["-"] if tasks == 1 else ["0", "1"]
    job = slurm.start(tasks=tasks, end="save")
    wait_for(*(slurm.folder / f"ready-{rank}" for rank in ranks))
    job.send_signal(number)
    # Slurm's second one comes while ranks save.
    time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    assert (job.wait(30), slurm.requeued) == (code, requeued)
    for rank in ranks:
        assert (slurm.folder / f"heard-{rank}").exists()


def test_arguments_arrive_as_they_were_typed(slurm: Slurm) -> None:
    odd = ["chat.prompt='a $HOME `b` 100%'", "data.train=a b.jsonl", "x={1,2}*"]
    assert slurm.end(*odd, end=0) == 0
    called = json.loads((slurm.folder / "called--").read_text())
    assert called == ["-m", "llmtune", f"output_dir={slurm.run}", *odd]


@pytest.mark.parametrize(("given", "handed_on"), [(None, ""), ("8", "8")])
def test_every_rank_keeps_its_cores(given: str | None, handed_on: str, slurm: Slurm) -> None:
    slurm.environment |= {} if given is None else {"SLURM_CPUS_PER_TASK": given}
    assert slurm.end(tasks=2, end=0) == 0
    assert [(slurm.folder / f"cores-{rank}").read_text() for rank in range(2)] == [handed_on] * 2


@pytest.mark.parametrize("end", [0, 2, 3, 4, 5, 7, 1, 130])
def test_what_is_done_or_wrong_is_not_queued_again(end: int, slurm: Slurm) -> None:
    assert (slurm.end(end=end), slurm.requeued) == (end, 0)


@pytest.mark.parametrize(("end", "tasks"), [(75, 1), (-9, 1), (-9, 2), (-15, 1), (-10, 2)])
def test_what_is_killed_each_time_is_not_queued_for_ever(
    end: int, tasks: int, slurm: Slurm
) -> None:
    shown = 128 - end if end < 0 else end
    assert [slurm.end(tasks=tasks, end=end) for _ in range(3)] == [0, 0, shown]
    assert slurm.requeued == 2
    # Somebody has looked at it, and submits it anew.
    assert (slurm.end(tasks=tasks, end=end), slurm.requeued) == (0, 3)


def test_a_job_that_gets_on_is_queued_as_often_as_it_takes(slurm: Slurm) -> None:
    for number in range(1, 6):
        # Two in vain, and one that saves: names are compared as numbers.
        assert slurm.end(end=-9) == 0
        assert slurm.end(end=75) == 0
        assert slurm.end(end=-9, checkpoints=[number * 6]) == 0
    assert slurm.requeued == 15
    assert slurm.end(end=0) == 0
    assert [path.name for path in slurm.folder.iterdir() if "in-vain" in path.name] == []


def test_no_interpreter_and_no_folder_are_said(slurm: Slurm) -> None:
    slurm.environment["PYTHON"] = "no-such-python"
    assert (slurm.end(end=0), slurm.requeued) == (127, 0)
    done = subprocess.run(
        ["bash", str(SCRIPT), "model=tiny"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, "output_dir=FOLDER is missing" in done.stderr) == (2, True)


def test_its_options_are_those_that_the_docs_explain() -> None:
    text = (ROOT / "docs" / "nodes.md").read_text()
    options = [
        line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")
    ]
    assert [option for option in options if f"`{option}`" not in text] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "tasks", [1, 2], ids=["one task, its own supervisor", "two tasks under srun"]
)
def test_a_real_run_is_stopped_twice_and_comes_to_its_end(tasks: int, slurm: Slurm) -> None:
    slurm.environment |= {
        "PYTHON": sys.executable,
        MARK: "slurm",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    job = [
        *TINY,
        "precision=fp32",
        "train.max_steps=40",
        "train.save_steps=10",
        "train.eval_steps=40",
        "export=none",
    ]
    job += ["launch.nproc=2"] if tasks == 1 else []
    for stop in range(2):
        process = slurm.start(*job, tasks=tasks)
        before = count_losses(slurm.run)
        while count_losses(slurm.run) < before + 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(120) == 0
        assert slurm.requeued == stop + 1, "it had saved"
    assert slurm.start(*job, tasks=tasks).wait(240) == 0
    assert (slurm.requeued, count_losses(slurm.run)) == (2, 40)
    assert json.loads((slurm.run / "finished.json").read_text())["step"] == 40


def count_losses(run: Path) -> int:
    return len(losses(run)) if (run / "metrics.jsonl").is_file() else 0

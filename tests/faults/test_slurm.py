"""``scripts/slurm.sh`` under a real Slurm of one machine: submit, signal, requeue, arrays.

It needs root and Debian's ``slurm-wlm``; the daemons are started here, on ports of their own.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Undisturbed
from tests.faults.harness import BASE, SAVE_STEPS, Run, judge_losses
from tests.support import ROOT, free_port

pytestmark = [pytest.mark.process, pytest.mark.slow]

SCRIPT = ROOT / "scripts" / "slurm.sh"
CONFIG = """
ClusterName=llmtune
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={control}
SlurmdPort={node}
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
JobRequeue=1
KillWait=60
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """The daemons, and the jobs of one run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._config = folder / "slurm.conf"

    def __enter__(self) -> Slurm:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        names = {"host": socket.gethostname().split(".")[0], "folder": self.folder}
        ports = {"control": free_port(), "node": free_port()}
        self._config.write_text(CONFIG.format(**names, **ports))
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o400)
        self.folder.chmod(0o755)
        munge = ["munged", "--foreground", "--force", f"--key-file={key}"]
        munge += [f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munge.pid"]
        munge += [f"--log-file={self.folder}/munge.log", f"--seed-file={self.folder}/munge.seed"]
        for command in (munge, ["slurmctld", "-D", "-i"], ["slurmd", "-D", "-c"]):
            log = (self.folder / f"{command[0]}.out").open("wb")
            daemon = subprocess.Popen(
                ["/usr/sbin/" + command[0], *command[1:]], env=self.env, stdout=log, stderr=log
            )
            self._daemons.append(daemon)
            time.sleep(2)
        self.wait(lambda: "idle" in self.run("sinfo", "-h", "-o", "%T"), "an idle node", 60)
        return self

    def __exit__(self, *_: object) -> None:
        self.run("scancel", "--me", "--quiet", check=False)
        time.sleep(1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(30)

    @property
    def env(self) -> dict[str, str]:
        """The environment of Slurm's commands, which jobs inherit."""
        own = {"SLURM_CONF": str(self._config), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        return {**os.environ, **own, "DS_ACCELERATOR": "cpu"}

    def run(self, *command: str, check: bool = True, env: dict[str, str] | None = None) -> str:
        """A command of Slurm; what it prints."""
        whole = {**self.env, **(env or {})}
        done = subprocess.run(command, env=whole, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    def submit(self, run: Run, *arguments: str, options: tuple[str, ...] = ()) -> str:
        """Submit the run; the job's number."""
        slow = {
            "PYTHONPATH": str(Path(__file__).parent / "inside"),
            "FAULT_DIR": str(run.traces),
            "FAULT_SLOW": '{"step:*": 0.5}',
        }
        command = ["sbatch", "--parsable", f"--output={run.traces}/job-%a.txt", *options]
        words = [str(SCRIPT), *run.overrides, *arguments]
        return self.run(*command, *words, env=slow).strip()

    def state(self, job: str) -> str:
        """The state of a job, such as ``RUNNING``; that of an array's tasks, joined."""
        fields = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return " ".join(f.partition("=")[2] for f in fields if f.startswith("JobState="))

    def finish(self, job: str, seconds: float = 400) -> None:
        """Until it is done. What is queued again begins at once, and not in two minutes."""

        def is_done() -> bool:
            states = self.state(job).split()
            if "PENDING" in states:
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            bad = {"FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"} & set(states)
            assert not bad, f"{states}\n{self.read()}"
            return set(states) == {"COMPLETED"}

        self.wait(is_done, f"the end of job {job}", seconds)

    def wait(self, look: object, what: str, seconds: float) -> None:
        """Until ``look`` is true."""
        assert callable(look)
        deadline = time.monotonic() + seconds
        while not look():
            assert time.monotonic() < deadline, f"{what} did not come\n{self.read()}"
            time.sleep(0.5)

    def read(self) -> str:
        """The logs, for a message."""
        logs = [*self.folder.glob("*.log"), *self.folder.parent.rglob("job-*.txt")]
        return "\n".join(f"== {log}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A Slurm whose jobs see this checkout."""
    missing = [
        name for name in ("munged", "slurmctld", "slurmd") if not shutil.which(f"/usr/sbin/{name}")
    ]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and slurm-wlm; missing: {', '.join(missing) or 'root'}")
    with Slurm(tmp_path_factory.mktemp("slurm")) as made:
        yield made


def make_run(folder: Path, *base: str) -> Run:
    return Run(folder / "shared", ("zero=2",), base or BASE)


def wait_for_step(slurm: Slurm, run: Run, step: int) -> None:
    slurm.wait(
        lambda: any(e["event"] == "step" and e["step"] == step for e in run.events()),
        f"step {step}",
        240,
    )


#: Two ranks: of llmtune's own supervisor in one task, or one in each of two tasks.
WAYS = {
    "supervisor": ((), tuple(BASE)),
    "srun": (
        ("--ntasks-per-node=2",),
        tuple(text for text in BASE if not text.startswith("launch.nproc")),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_job_that_is_told_to_save_is_queued_again_and_ends_with_the_same_losses(
    way: str, slurm: Slurm, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    options, base = WAYS[way]
    run = make_run(tmp_path, *base)
    job = slurm.submit(run, f"output_dir={run.path}", options=options)
    wait_for_step(slurm, run, SAVE_STEPS + 3)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.wait(lambda: "PENDING" in slurm.state(job), "the requeue", 120)
    saved = set(run.complete())
    assert saved, "the save that the signal asked for"
    slurm.finish(job)
    assert "exit code 75, queued again" in (run.traces / "job-4294967294.txt").read_text()
    assert judge_losses(run.path, undisturbed("zero=2")) == []


def test_a_killed_job_is_queued_again(
    slurm: Slurm, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    run = make_run(tmp_path)
    job = slurm.submit(run, f"output_dir={run.path}")
    wait_for_step(slurm, run, 2 * SAVE_STEPS + 3)
    pids = subprocess.run(
        ["pgrep", "-f", f"llmtune .*{run.path}"], capture_output=True, text=True, check=True
    )
    for pid in map(int, pids.stdout.split()):
        os.kill(pid, signal.SIGKILL)
    slurm.wait(lambda: "PENDING" in slurm.state(job), "the requeue", 120)
    slurm.finish(job)
    assert judge_losses(run.path, undisturbed("zero=2")) == []


def test_the_tasks_of_an_array_have_a_run_each(slurm: Slurm, tmp_path: Path) -> None:
    base = [text for text in BASE if not text.startswith(("launch.nproc", "train.max_steps"))]
    run = make_run(tmp_path, *base, "launch.nproc=1", "train.max_steps=4")
    folder = tmp_path / "array"
    folder.mkdir()
    job = slurm.submit(run, f"output_dir={folder}/run-%a", "seed=%a", options=("--array=1-2",))
    slurm.finish(job)
    assert sorted(entry.name for entry in folder.iterdir()) == ["run-1", "run-2"]
    for seed in (1, 2):
        assert (folder / f"run-{seed}" / "finished.json").is_file()
        assert f"\nseed: {seed}\n" in (folder / f"run-{seed}" / "config.yaml").read_text()


def test_a_job_that_cannot_work_fails_and_is_not_queued_again(slurm: Slurm, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    job = slurm.submit(run, f"output_dir={run.path}", "train.max_stepps=4")
    slurm.wait(lambda: "FAILED" in slurm.state(job), "the end", 120)
    assert "ExitCode=2:0" in slurm.run("scontrol", "show", "job", "--oneliner", job)

"""A real run on two ranks, started as a user starts it, that tests break; and the one verdict on
what became of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmtune.checkpoint.find import find_checkpoints
from llmtune.storage import layout
from llmtune.storage.manifest import find_damage
from tests.processes import MARK, comm_of
from tests.support import ROOT

STEPS, SAVE_STEPS, KEPT = 24, 4, 2
SAVED_STEPS = range(SAVE_STEPS, STEPS + 1, SAVE_STEPS)
EVALUATED_STEPS = (0, 8, 16, 24)

#: The run of all tests here: a start takes 15 s, a step 0.03 s, a save 0.05 s.
BASE = [
    "model=tiny",
    "data.train=stdlib_docs@200",
    "data.val_set_size=16",
    "data.max_seq_length=256",
    "precision=fp32",
    "optim.learning_rate=2e-3",
    "launch.nproc=2",
    f"train.max_steps={STEPS}",
    f"train.save_steps={SAVE_STEPS}",
    "train.eval_steps=8",
    f"train.save_total_limit={KEPT}",
    "export=none",
    "train.sample_answers=false",
]

#: Until processes are gone whose supervisor was killed.
GRACE_SECONDS = 5.0
START_SECONDS = 240.0


class Run:
    """One run folder, and the commands that were started on it one after the other."""

    def __init__(
        self, folder: Path, overrides: Sequence[str] = ("zero=2",), base: Sequence[str] = BASE
    ):
        """
        Args:
            folder: A new folder for everything; the run's own is ``folder / "run"``.
        """
        self.path = folder / "run"
        self.overrides = [*base, *overrides]
        self.traces = folder / "traces"
        self.traces.mkdir(parents=True)
        self.mark = uuid.uuid4().hex
        self.starts = 0
        self.process: subprocess.Popen[bytes] | None = None

    def start(
        self,
        *more: str,
        slow: dict[str, float] | None = None,
        gates: Sequence[str] = (),
        env: dict[str, str] | None = None,
    ) -> None:
        """The command, in the background."""
        self.starts += 1
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent / "inside"),
            "FAULT_DIR": str(self.traces),
            "FAULT_SLOW": json.dumps(slow or {}),
            "FAULT_GATES": json.dumps(list(gates)),
            MARK: self.mark,
            **(env or {}),
        }
        command = [
            sys.executable,
            "-m",
            "llmtune",
            *self.overrides,
            f"output_dir={self.path}",
            *more,
        ]
        with self._console_file().open("wb") as console:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=console, stderr=console
            )

    def end(self, timeout: float = START_SECONDS) -> int:
        """Wait for the command; its exit code."""
        assert self.process is not None
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {timeout:g} s\n{self.console}") from None

    def finish(self, *more: str, env: dict[str, str] | None = None) -> None:
        """The same command again, to its good end."""
        self.start(*more, env=env)
        code = self.end()
        assert code == 0, f"exit code {code}\n{self.console}"

    @property
    def console(self) -> str:
        """What the last command printed."""
        return self._console_file().read_text(errors="replace")

    def events(self) -> list[dict[str, Any]]:
        """What all processes noted, in order."""
        found = []
        for file in self.traces.glob("trace-*.jsonl"):
            for line in file.read_text().split("\n"):
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return sorted(found, key=lambda event: float(event["time"]))

    def wait_for(
        self, event: str, step: int | None = None, rank: str | None = None, after: float = 0.0
    ) -> float:
        """Until a process noted it; when that was."""

        def seen() -> float | None:
            for line in self.events():
                fits = line["event"] == event and (step is None or line["step"] == step)
                if fits and (rank is None or line["rank"] == rank) and line["time"] > after:
                    return float(line["time"])
            return None

        return float(self.wait_until(seen, f"{event} {step or ''} of rank {rank or 'any'}"))

    def wait_at(self, gate: str) -> None:
        """Until a process stands at a gate."""
        self.wait_until(lambda: (self.traces / f"at {gate}").exists() or None, f"the gate {gate}")

    def open(self, gate: str) -> None:
        """Let it go on."""
        (self.traces / f"open {gate}").touch()

    def wait_until(self, look: Callable[[], Any], what: str, timeout: float = START_SECONDS) -> Any:
        """Until ``look`` gives something, while the command runs."""
        assert self.process is not None
        deadline = time.monotonic() + timeout
        while (found := look()) is None:
            code = self.process.poll()
            assert code is None, f"ended with {code} before {what}\n{self.console}"
            assert time.monotonic() < deadline, (
                f"{what} did not come within {timeout:g} s\n{self.console}"
            )
            time.sleep(0.005)
        return found

    def pid(self, victim: str) -> int:
        """Process id of ``supervisor``, or of a rank that was started last."""
        assert self.process is not None
        if victim == "supervisor":
            return self.process.pid
        return int(
            next(event["pid"] for event in reversed(self.events()) if event["rank"] == victim)
        )

    def send(self, victim: str, number: signal.Signals) -> float:
        """Signal one process; when."""
        os.kill(self.pid(victim), number)
        return time.monotonic()

    def complete(self) -> dict[str, str]:
        """Complete checkpoints, each with what its marker says."""
        found = {}
        for folder in find_checkpoints(self.path):
            # It may be pruned while we look.
            with contextlib.suppress(OSError):
                found[folder.name] = (folder / layout.COMPLETE).read_text()
        return found

    def alive(self) -> list[int]:
        """Processes of this run."""
        return alive(self.mark)

    def count_orphans(self) -> int:
        """Processes that are still there a while after the supervisor's end."""
        deadline = time.monotonic() + GRACE_SECONDS
        while (left := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return len(left)

    def shared_memory(self) -> list[Path]:
        """What is left of the ranks' buffers in ``/dev/shm``."""
        ports = {event["port"] for event in self.events() if event["port"]}
        # Other launchers name another address, and their files may be older than this run.
        names = [f"deepspeed_allreduce_buffer_*_127.0.0.1_{port}_*" for port in ports]
        return [path for name in names for path in Path("/dev/shm").glob(name)]

    def resumed_step(self) -> int:
        """Where the last attempt of the last command went on."""
        last_page = self.console[self.console.rfind("\n  run folder") :]
        found = re.search(r"^ +resuming +\S*checkpoint-(\d+)$", last_page, re.MULTILINE)
        return int(found[1]) if found else 0

    def last_step(self, until: float) -> int:
        """The last optimizer step that was done at a moment."""
        done = [
            event["step"]
            for event in self.events()
            if event["event"] == "stepped" and event["time"] <= until
        ]
        return max(done, default=0)

    def clean(self) -> None:
        """Leave nothing on the machine."""
        for pid in self.alive():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait(30)
        for file in self.shared_memory():
            file.unlink(missing_ok=True)

    def _console_file(self) -> Path:
        return self.traces / f"console-{self.starts}.txt"


def alive(mark: str) -> list[int]:
    """Processes with this mark in their environment, or as their name."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            # Gone meanwhile, or a zombie.
            with contextlib.suppress(OSError):
                named = (entry / "comm").read_text().strip() == comm_of(mark)
                if named and (entry / "statm").read_text().startswith("0 "):
                    continue
                if named or f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


@dataclass(frozen=True)
class Reference:
    """The undisturbed run."""

    losses: dict[int, tuple[float, float]]
    """Step -> loss and gradient norm."""
    evaluations: dict[int, float]
    path: Path


@dataclass
class Snapshot:
    """A run at the moment of a fault."""

    complete: dict[str, str]
    step: int
    """The last that was done."""
    saving: int | None
    """The step whose checkpoint was being written."""


@dataclass(kw_only=True)
class Trial:
    """What became of one fault."""

    fault: str
    """The row of the table."""
    name: str
    resumed: bool = False
    lost_steps: int = 0
    """Done before the fault and done again."""
    beyond: int = 0
    """Of those: more than ``save_steps`` before the newest checkpoint that was begun."""
    wrong: list[str] = field(default_factory=list)
    orphans: int = 0
    seconds: float = 0.0


def take_snapshot(run: Run, moment: float) -> Snapshot:
    """What stood complete and what was under way when the fault came."""
    begun: dict[int, int] = {}
    for event in run.events():
        if event["time"] <= moment and event["event"] in ("save", "saved"):
            begun[event["step"]] = begun.get(event["step"], 0) | (
                1 if event["event"] == "save" else 2
            )
    saving = max((step for step, state in begun.items() if state == 1), default=None)
    return Snapshot(run.complete(), run.last_step(moment), saving)


def read_lines(run: Path) -> tuple[dict[int, list[Any]], dict[int, list[Any]]]:
    """Training and evaluation lines by step."""
    losses: dict[int, list[Any]] = {}
    evaluations: dict[int, list[Any]] = {}
    for text in (run / layout.METRICS).read_text().splitlines():
        line = json.loads(text)
        if "eval_loss" in line:
            evaluations.setdefault(line["step"], []).append(line["eval_loss"])
        else:
            losses.setdefault(line["step"], []).append((line["loss"], line["grad_norm"]))
    return losses, evaluations


def read_reference(path: Path) -> Reference:
    """The numbers of a finished run, which must be whole itself."""
    losses, evaluations = read_lines(path)
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert sorted(evaluations) == list(EVALUATED_STEPS)
    return Reference(
        {step: values[0] for step, values in losses.items()},
        {step: values[0] for step, values in evaluations.items()},
        path,
    )


def find_lost(run: Run, snapshot: Snapshot) -> list[str]:
    """Complete checkpoints of then that are gone or changed, though retention had no reason to."""
    now, problems = run.complete(), []
    for name, marker in snapshot.complete.items():
        newer = [other for other in now if _step(other) > _step(name)]
        if name in now and now[name] != marker:
            problems.append(f"{name} is another one than before the fault")
        elif name not in now and len(newer) < KEPT:
            problems.append(f"{name} was complete and is gone (now: {sorted(now)})")
    return problems


def judge_losses(run: Path, reference: Reference) -> list[str]:
    """Every step and evaluation has one line, with the numbers of the undisturbed run."""
    losses, evaluations = read_lines(run)
    problems = []
    for kind, found, wanted in (
        ("loss", losses, reference.losses),
        ("evaluation", evaluations, reference.evaluations),
    ):
        if sorted(found) != sorted(wanted):
            problems.append(f"{kind} lines of steps {sorted(found)}")
        for step, values in found.items():
            if len(values) != 1:
                problems.append(f"{len(values)} {kind} lines of step {step}")
            elif step in wanted and values[0] != wanted[step]:
                problems.append(f"{kind} of step {step}: {values[0]} instead of {wanted[step]}")
    return problems


def judge_folder(run: Run) -> list[str]:
    """A finished run leaves whole checkpoints, the last among them, and nothing half-done."""
    problems = []
    if f"checkpoint-{STEPS}" not in run.complete():
        problems.append(f"checkpoint-{STEPS} is not complete")
    for folder in find_checkpoints(run.path):
        problems += [f"{folder.name}: {text}" for text in find_damage(folder)]
    problems += [
        f"{path.name} was left behind" for path in run.path.iterdir() if path.name.endswith(".tmp")
    ]
    if not (run.path / layout.FINISHED).is_file():
        problems.append(f"no {layout.FINISHED}")
    return problems


def judge(
    run: Run, trial: Trial, reference: Reference, snapshot: Snapshot | None, killed: bool = False
) -> None:
    """The verdict on a run that has gone to its end after a fault.

    Args:
        snapshot: Of the moment of the fault; None where no step was to be done again.
        killed: Whether the supervisor itself was killed, so that nobody could clear up behind it.
    """
    trial.orphans += run.count_orphans()
    trial.wrong += judge_losses(run.path, reference) + judge_folder(run)
    if not killed:
        trial.wrong += [f"{path} was left behind" for path in run.shared_memory()]
    if snapshot is not None:
        trial.wrong += find_lost(run, snapshot)
        judge_resume(run, trial, snapshot)
    trial.resumed = True


def judge_resume(run: Run, trial: Trial, snapshot: Snapshot) -> None:
    """It went on from the newest complete checkpoint, and what was lost is what came after that."""
    resumed = run.resumed_step()
    newest = max(map(_step, snapshot.complete), default=0)
    trial.lost_steps = max(0, snapshot.step - resumed)
    # While a checkpoint is being written in the background, the newest one is the one before it.
    begun = snapshot.saving if snapshot.saving is not None else snapshot.step
    trial.beyond = max(0, min(begun, snapshot.step) - resumed - SAVE_STEPS)
    if resumed < newest:
        trial.wrong.append(f"went on from step {resumed}, though checkpoint-{newest} was complete")


def copy_run(reference: Reference, folder: Path, overrides: Sequence[str] = ("zero=2",)) -> Run:
    """A copy of a finished run, as it was before its last step was published."""
    run = Run(folder, overrides)
    shutil.copytree(reference.path, run.path)
    (run.path / layout.FINISHED).unlink()
    shutil.rmtree(run.path / layout.ADAPTER, ignore_errors=True)
    return run


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int = 8) -> Iterator[Path]:
    """A tmpfs of its own."""
    folder.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def can_mount(folder: Path) -> bool:
    """Whether this machine lets us."""
    try:
        with small_disk(folder / "probe-of-mount"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def fill(disk: Path) -> Path:
    """Use up every byte; the file that does."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for block in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(block))
    return ballast


class Table:
    """Trials of this session, appended to a file of one JSON object a line, so that no cut session
    loses any.
    """

    def __init__(self, file: Path | None):
        self.file = file

    @contextlib.contextmanager
    def trial(self, fault: str, name: str, *runs: Run) -> Iterator[Trial]:
        """Record what becomes of it; fails where anything is wrong with it."""
        trial, started = Trial(fault=fault, name=name), time.monotonic()
        try:
            yield trial
        except AssertionError as error:
            trial.wrong.append(str(error).split("\n")[0])
            raise
        finally:
            for run in runs:
                run.clean()
            trial.seconds = round(time.monotonic() - started, 1)
            if self.file is not None:
                with self.file.open("a") as out:
                    out.write(json.dumps(asdict(trial)) + "\n")
        assert (trial.wrong, trial.orphans, trial.beyond) == ([], 0, 0), trial


def _step(name: str) -> int:
    return int(name.rpartition("-")[2])

"""Runs on the device and on the CPU, each made once: several checks look at some of them."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from llmtune.errors import ConfigError, MissingPrerequisiteError
from llmtune.launch.preflight.deepspeed_ops import has_libaio
from scripts.gpu_check.commands import Clock, Commands, Finished, RunFailedError
from scripts.gpu_check.compare import Curve
from scripts.gpu_check.jobs import Job, Trained

#: Exit codes of what llmtune refuses because of the machine: bf16 of an old card is a setting that
#: cannot work there.
_REFUSED = (ConfigError.exit_code, MissingPrerequisiteError.exit_code)
#: What a machine may lack: half precision, or direct I/O.
_LACKS = re.compile(r"precision=(bf16|fp16): |offload\.nvme_path=\S+ no direct I/O")
#: The op for NVMe. A machine may lack libaio; with it, an op that cannot be had is what these
#: checks are for.
_LACKS_OP = re.compile(r"DeepSpeed's AsyncIO ")
#: Of a run on the CPU, which may be a small one.
_REFERENCE_SECONDS = 400.0


class SkippedError(Exception):
    """This machine cannot do it, and says so itself."""


class Bench:
    """Everything that checks start."""

    def __init__(self, device: str, work: Path, timeout: float):
        """
        Args:
            device: ``cuda`` or ``cpu``: what takes the place of the GPU.
            work: For run folders and swap files, on a local disk.
            timeout: Of a check, in seconds.
        """
        self.device = device
        self.work = work
        self.commands = Commands(work)
        self.clock = Clock(timeout)
        self._timeout = timeout
        self._trained: dict[str, Trained] = {}
        self._references: dict[tuple[str, ...], Future[Trained]] = {}
        self._thread = ThreadPoolExecutor(1)
        self._names = threading.Lock()

    def start_clock(self) -> None:
        """A new check begins."""
        self.clock = Clock(self._timeout)

    def train(self, job: Job) -> Trained:
        """The run on the device.

        Raises:
            SkippedError: The machine cannot do it.
            RunFailedError: It failed otherwise.
        """
        if job.name not in self._trained:
            folder = self.folder(job.name)
            self._trained[job.name] = self.train_in(folder, job)
        return self._trained[job.name]

    def train_in(self, folder: Path, job: Job, *more: str) -> Trained:
        """The same with other overrides, in a folder of its own."""
        done = self.commands.llmtune(*self.arguments(folder, job), *more, clock=self.clock)
        return trained(done, folder)

    def arguments(self, folder: Path, job: Job) -> list[str]:
        """Of a run on the device."""
        nvme = f"offload.nvme_path={self.work / 'nvme'}"
        return [*job.arguments, nvme, f"hardware.accelerator={self.device}", f"output_dir={folder}"]

    def folder(self, name: str) -> Path:
        """For a run of this name."""
        return self.work / name.replace("/", "-") / "run"

    def ask(self, job: Job) -> Future[Trained]:
        """Have the run on the CPU made, behind those that were asked for before."""
        reference = job.reference
        with self._names:
            if reference.arguments not in self._references:
                folder = self.work / f"reference-{len(self._references)}" / "run"
                self._references[reference.arguments] = self._thread.submit(
                    self._train_reference, reference, folder
                )
            return self._references[reference.arguments]

    def expected(self, job: Job) -> Curve:
        """What the run on the CPU computed; waits for it.

        Raises:
            SkippedError, RunFailedError: As :meth:`train`.
        """
        return self.ask(job).result().curve

    def prepare(self, jobs: Sequence[Job], alone: bool = False) -> None:
        """Wait for the runs on the CPU that these jobs need, whether they succeed or not.

        Args:
            alone: And for all others, so that nothing runs beside what is to be measured.
        """
        needed = [self.ask(job) for job in jobs]
        for future in list(self._references.values()) if alone else needed:
            future.exception()

    def evaluate(self, *target: str, device: str | None = None) -> float:
        """Held-out loss by ``eval``."""
        accelerator = f"hardware.accelerator={device or self.device}"
        done = self.commands.llmtune(
            "eval", *target, accelerator, "--json", clock=self.clock
        ).check()
        return float(json.loads(done.out)["eval_loss"])

    def close(self) -> None:
        """End all that runs."""
        self.commands.end_all()
        self._thread.shutdown(cancel_futures=True)

    def _train_reference(self, job: Job, folder: Path) -> Trained:
        # While the device's runs go on beside it, half of the cores are theirs.
        cores = str(max(1, len(os.sched_getaffinity(0)) // 2))
        environment = {"OMP_NUM_THREADS": cores} if self.device != "cpu" else None
        arguments = [*job.arguments, "hardware.accelerator=cpu", f"output_dir={folder}"]
        done = self.commands.llmtune(
            *arguments, clock=Clock(max(self._timeout, _REFERENCE_SECONDS)), environment=environment
        )
        return trained(done, folder, "the run on the CPU: ")


def trained(done: Finished, folder: Path, whose: str = "") -> Trained:
    """A command that has trained.

    Raises:
        SkippedError, RunFailedError: It has not.
    """
    if done.code in _REFUSED and (
        _LACKS.search(done.err) or (_LACKS_OP.search(done.err) and not has_libaio())
    ):
        raise SkippedError(f"{whose}{done.err.strip().splitlines()[-1].removeprefix('error: ')}")
    try:
        done.check()
    except RunFailedError as error:
        raise RunFailedError(f"{whose}{error}{_last_lines(folder / 'train.log')}") from None
    return Trained(folder, done.out)


def _last_lines(log: Path) -> str:
    if not log.is_file():
        return ""
    return "\n" + "\n".join(log.read_text(errors="replace").splitlines()[-5:])

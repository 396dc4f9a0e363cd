"""The checks: what each runs, and what it must come to."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from llmtune.plan.devices.gpus import visible_gpus
from llmtune.units import format_bytes
from scripts.gpu_check import jobs
from scripts.gpu_check.bench import Bench, SkippedError, trained
from scripts.gpu_check.commands import RunFailedError, descendants
from scripts.gpu_check.compare import LOSS_TOLERANCE, Verdict, compare_curves, compare_number
from scripts.gpu_check.jobs import (
    ADAPTER,
    LARGE_SMOLLM2,
    PROFILED,
    QUANTIZED,
    SMALL_SMOLLM2,
    UNDISTURBED,
    UNLIMITED,
    Job,
)
from scripts.gpu_check.speed import compare_plan

#: Every ZeRO stage with the rungs of the ladder that it has.
PLACEMENTS = {
    0: ("none",),
    1: ("none", "optimizer_cpu"),
    2: ("none", "optimizer_cpu"),
    3: ("none", "optimizer_cpu", "cpu", "optimizer_nvme", "nvme"),
}
#: Precision, tuner, rows, stage, rung: with the placements, which are fp32, full and padded, each
#: value meets each other one.
PRECISIONS = (
    ("fp32", "lora", "packed", 3, "cpu"),
    ("bf16", "full", "packed", 2, "optimizer_cpu"),
    ("bf16", "lora", "padded", 1, "none"),
    ("fp16", "full", "padded", 2, "none"),
    ("fp16", "lora", "packed", 0, "none"),
)
#: Tuner, stage, rung.
TUNERS = (
    ("dora", 0, "none"),
    ("rslora", 1, "none"),
    ("lora_plus", 2, "optimizer_cpu"),
    ("pissa", 3, "none"),
    ("freeze", 3, "cpu"),
    ("qlora", 0, "none"),
    ("qlora", 2, "none"),
    ("qlora", 3, "none"),
    ("qlora", 3, "cpu"),
)
#: Optimizer, stage, rung.
OPTIMIZERS = (
    ("adamw_bf16", 3, "none"),
    ("adamw_bf16", 2, "optimizer_cpu"),
    ("adamw_8bit", 3, "none"),
    ("adamw_8bit", 3, "cpu"),
    ("adamw_paged_8bit", 3, "none"),
    ("muon", 2, "none"),
    ("lion", 1, "none"),
    ("adafactor", 0, "none"),
)
#: The memory that a run is left of what it needs without a limit: too little for the optimizer's
#: states.
GPU_MEMORY_SHARE, CPU_BYTES_LESS = 0.7, 150 * 2**20
#: Until ranks are gone whose main process was killed.
_GRACE_SECONDS = 10.0
_RESUMING = re.compile(r"^ +resuming +\S*checkpoint-(\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the report."""

    name: str
    run: Callable[[Bench], Verdict]
    jobs: tuple[Job, ...] = ()
    """Those of whose runs on the CPU it needs the losses."""
    alone: bool = False
    """It measures time or memory, so that nothing may run beside it."""


def all_checks(device: str, cards: int) -> list[Check]:
    """In the order in which they run."""
    return [
        *(
            _losses(jobs.placement_job(stage, rung))
            for stage, rungs in PLACEMENTS.items()
            for rung in rungs
        ),
        *(_losses(jobs.precision_job(*cell)) for cell in PRECISIONS),
        *(_losses(jobs.tuner_job(*cell)) for cell in TUNERS),
        *(_losses(jobs.optimizer_job(*cell)) for cell in OPTIMIZERS),
        _losses(jobs.ranks_job(cards)),
        _losses(UNDISTURBED),
        Check(name="resume/killed", run=_check_killed),
        Check(name="evaluation/adapter", run=_check_evaluation),
        Check(name="export/merged", run=_check_export),
        Check(name="export/qlora", run=_check_qlora_export),
        Check(name="watch/profile", run=_check_profile),
        Check(name="fallback/out-of-memory", run=_check_fallback, jobs=(UNLIMITED,)),
        _losses(SMALL_SMOLLM2),
        Check(name="smollm2/plan", run=_check_plan, alone=device != "cpu"),
        *(_large(name) for name in jobs.LARGE_WAYS),
    ]


def select(checks: Sequence[Check], patterns: Sequence[str]) -> list[Check]:
    """Those whose name matches a pattern, or has it in it; all of them without patterns."""
    if not patterns:
        return list(checks)
    return [
        check
        for check in checks
        if any(
            fnmatch.fnmatchcase(check.name, pattern) or pattern in check.name
            for pattern in patterns
        )
    ]


def _losses(job: Job) -> Check:
    """Train, and compare with the CPU."""

    def run(bench: Bench) -> Verdict:
        return compare_curves(bench.train(job).curve, bench.expected(job), job.precision)

    return Check(name=job.name, run=run, jobs=(job,))


def _check_killed(bench: Bench) -> Verdict:
    """The main process is killed between two checkpoints, and the same command goes on to the same
    losses.
    """
    whole = bench.train(UNDISTURBED).curve
    folder = bench.folder("resume/killed")
    killer = _Killer(folder)
    arguments = bench.arguments(folder, UNDISTURBED)
    first = bench.commands.llmtune(*arguments, clock=bench.clock, watch=killer.look)
    problems = list(killer.problems(first.code))
    steps_done = _steps(folder)
    resumed = trained(bench.commands.llmtune(*arguments, clock=bench.clock), folder)
    verdict = compare_curves(resumed.curve, whole, UNDISTURBED.precision)
    found = _RESUMING.search(resumed.console)
    resumed_from = int(found[1]) if found else 0
    if not 0 < resumed_from < steps_done < len(whole.losses):
        problems.append(f"killed after step {steps_done}, it went on from step {resumed_from}")
    measured = {
        **verdict.measured,
        "killed_after_step": steps_done,
        "resumed_from_step": resumed_from,
    }
    return Verdict(
        measured=measured,
        expected=verdict.expected,
        tolerance=verdict.tolerance,
        problems=[*problems, *verdict.problems],
    )


class _Killer:
    """Kills a main process that has made steps since its first checkpoint, and sees what becomes of
    its ranks.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._ranks: list[psutil.Process] = []
        self._has_killed = False

    def look(self, process: subprocess.Popen[bytes]) -> None:
        """Kill it, if it is time."""
        if self._has_killed or not (self._folder / "checkpoint-4" / "COMPLETE").exists():
            return
        if len(_step_lines(self._folder)) > 5:
            self._ranks = descendants(process.pid)
            os.kill(process.pid, signal.SIGKILL)
            self._has_killed = True
            psutil.wait_procs(self._ranks, _GRACE_SECONDS)

    def problems(self, code: int) -> list[str]:
        """What did not go as it should."""
        if code != -signal.SIGKILL:
            return [f"it ended with exit code {code} before it could be killed"]
        left = [
            rank
            for rank in self._ranks
            if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE
        ]
        return (
            [f"{len(left)} processes of the killed run were still there after {_GRACE_SECONDS:g} s"]
            if left
            else []
        )


def _check_evaluation(bench: Bench) -> Verdict:
    """``eval`` on the device, on the CPU, and what training itself found at its end."""
    run = bench.train(ADAPTER)
    tolerance = LOSS_TOLERANCE[ADAPTER.precision]
    measured = bench.evaluate(f"run={run.folder}")
    expected = {
        "on_the_cpu": bench.evaluate(f"run={run.folder}", device="cpu"),
        "in_training": run.curve.after,
    }
    problems = [
        problem
        for name, value in expected.items()
        for problem in compare_number(
            f"the held-out loss (against {name.replace('_', ' ')})", measured, value, tolerance
        )
    ]
    return Verdict(
        measured={"held_out_loss": measured},
        expected=expected,
        tolerance=tolerance,
        problems=problems,
    )


def _check_export(bench: Bench) -> Verdict:
    """Merge with parity, and evaluate the merged model on the device against base and adapter on
    the CPU.
    """
    run = bench.train(ADAPTER)
    merged = bench.folder("export/merged")
    device = f"hardware.accelerator={bench.device}"
    done = bench.commands.llmtune(
        "export",
        f"run={run.folder}",
        "export=safetensors",
        "export.parity=true",
        device,
        f"output_dir={merged}",
        clock=bench.clock,
    ).check()
    said = re.search(r"parity: logits within (\S+) of base and adapter \(bound (\S+?)\)", done.out)
    tolerance = LOSS_TOLERANCE[ADAPTER.precision]
    data = [text for text in ADAPTER.overrides if text.startswith("data.")]
    measured = bench.evaluate(f"base={merged}", f"precision={ADAPTER.precision}", *data)
    expected = bench.evaluate(f"run={run.folder}", device="cpu")
    problems = compare_number(
        "the held-out loss of the merged model", measured, expected, tolerance
    )
    if said is None:
        problems.append("the export did not say how near the logits are")
    logits, bound = (float(said[1]), float(said[2])) if said else (None, None)
    return Verdict(
        measured={"held_out_loss": measured, "logits": logits},
        expected={"held_out_loss": expected, "logits": 0.0},
        tolerance={"held_out_loss": tolerance, "logits": bound},
        problems=problems,
    )


def _check_fallback(bench: Bench) -> Verdict:
    """With less memory than it needs, a run takes the next rung by itself, to the same losses."""
    peak = _PeakData()
    name, folder = UNLIMITED.name, bench.folder(UNLIMITED.name)
    unlimited = bench.commands.llmtune(
        *bench.arguments(folder, UNLIMITED), clock=bench.clock, watch=peak.look
    )
    whole = trained(unlimited, folder)
    if bench.device == "cpu":
        limit = peak.largest - CPU_BYTES_LESS
    else:
        limit = int(GPU_MEMORY_SHARE * max(line["memory_bytes"] for line in _step_lines(folder)))
    limited = Job(
        name=name,
        overrides=UNLIMITED.overrides,
        placement=("zero=auto", "offload=auto"),
        precision=UNLIMITED.precision,
    )
    lower = bench.train_in(bench.folder(f"{name}-limited"), limited, f"launch.memory_limit={limit}")
    verdict = compare_curves(lower.curve, bench.expected(UNLIMITED), UNLIMITED.precision)
    problems = [
        *compare_curves(whole.curve, bench.expected(UNLIMITED), UNLIMITED.precision).problems,
        *verdict.problems,
    ]
    plan = json.loads((lower.folder / "plan.json").read_text())
    history = plan.get("history", [])
    if not history:
        problems.append(f"with {limit / 1e6:.0f} MB it did not run out of memory")
    came_to = "-".join(str(plan["placement"][key]) for key in ("zero_stage", "optimizer", "param"))
    left = [
        f"{event['phase']} of step {event['step']}, {event['pool']} memory" for event in history
    ]
    more = {"memory_limit_bytes": limit, "ran_out_in": left, "came_to": came_to}
    return Verdict(
        measured={**verdict.measured, **more},
        expected=verdict.expected,
        tolerance=verdict.tolerance,
        problems=problems,
    )


def _check_qlora_export(bench: Bench) -> Verdict:
    """Merge what was trained on 4-bit weights, and evaluate it against the adapter on them."""
    run = bench.train(QUANTIZED)
    merged = bench.folder("export/qlora")
    bench.commands.llmtune(
        "export",
        f"run={run.folder}",
        "export=safetensors",
        f"output_dir={merged}",
        clock=bench.clock,
    ).check()
    data = [text for text in QUANTIZED.overrides if text.startswith("data.")]
    measured = bench.evaluate(f"base={merged}", f"precision={QUANTIZED.precision}", *data)
    return Verdict(
        measured={"held_out_loss": measured},
        expected={"held_out_loss": run.curve.after},
        tolerance=LOSS_TOLERANCE[QUANTIZED.precision],
        problems=compare_number(
            "the held-out loss of the merged model",
            measured,
            run.curve.after,
            LOSS_TOLERANCE[QUANTIZED.precision],
        ),
    )


def _check_profile(bench: Bench) -> Verdict:
    """``debug=profile``: on a GPU the parts of a step are its kernels."""
    folder = bench.folder("watch/profile")
    run = bench.train_in(folder, PROFILED, "debug=profile")
    summary = (run.folder / "profile" / "summary.md").read_text()
    where = "the GPU of rank 0" if bench.device == "cuda" else "the processor of rank 0"
    problems = [] if where in summary else [f"the summary is not about {where}"]
    shares = {
        part: float(share)
        for part, share in re.findall(
            r"^\| ([a-z][^|`]*) \| [^|]+ \| ([0-9.]+)% \|$", summary, re.M
        )
    }
    if not 99.0 <= sum(shares.values()) <= 101.0:
        problems.append(f"the parts add up to {sum(shares.values()):.1f} % of a step")
    if not shares.get("matrix products", 0.0) > 0.0:
        problems.append("no matrix product was found")
    return Verdict(measured=shares, expected={"sum": 100.0}, tolerance=1.0, problems=problems)


def _large(name: str) -> Check:
    """Peak memory and seconds of a step of what fills tens of gigabytes."""

    def run(bench: Bench) -> Verdict:
        if bench.device == "cpu":
            raise SkippedError("it is too large for a CPU")
        if min(gpu.memory_bytes for gpu in visible_gpus()) < jobs.LARGE_BYTES:
            raise SkippedError(f"it needs a card of {format_bytes(jobs.LARGE_BYTES)}")
        job = jobs.large_job(name)
        return compare_plan(bench.train(job).folder, jobs.LARGE_LENGTH)

    return Check(name=f"large/{name}", run=run, alone=True)


class _PeakData:
    """The most data (``VmData``, which ``launch.memory_limit`` caps on a CPU) that a rank had."""

    def __init__(self) -> None:
        self.largest = 0

    def look(self, process: subprocess.Popen[bytes]) -> None:
        """Read it from ``/proc``."""
        for child in descendants(process.pid):
            try:
                if "llmtune.run.rank" not in child.cmdline():
                    continue
                status = Path(f"/proc/{child.pid}/status").read_text()
            except (OSError, psutil.Error):
                continue
            found = re.search(r"^VmData:\s+(\d+) kB", status, re.MULTILINE)
            self.largest = max(self.largest, int(found[1]) * 1024 if found else 0)
        time.sleep(0.02)


def _check_plan(bench: Bench) -> Verdict:
    """Peak memory and seconds of a step of SmolLM2-135M; where a CPU stands for the GPU, of the
    small job.
    """
    job, length = (SMALL_SMOLLM2, 256) if bench.device == "cpu" else (LARGE_SMOLLM2, 1024)
    return compare_plan(bench.train(job).folder, length)


def _step_lines(folder: Path) -> list[dict[str, float]]:
    """Lines of the steps in ``metrics.jsonl``; a line that was being written when the run was
    killed is none.
    """
    found = []
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if "loss" in line:
            found.append(line)
    return found


def _steps(folder: Path) -> int:
    if not (folder / "metrics.jsonl").is_file():
        raise RunFailedError("the run that was to be killed wrote no metrics.jsonl")
    return len(_step_lines(folder))

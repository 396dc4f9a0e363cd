"""``scripts/gpu_check.sh``: what makes a check fail, what its report says, and a run of it with the
CPU in the GPU's place.
"""

from __future__ import annotations

import io
import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from llmtune.config.schema import Precision
from llmtune.errors import LlmtuneError
from llmtune.plan.devices.hardware import Hardware
from llmtune.plan.resolve import _check_precision
from scripts.gpu_check import __main__ as program
from scripts.gpu_check.bench import Bench, SkippedError, trained
from scripts.gpu_check.checks import Check, all_checks, select
from scripts.gpu_check.commands import Clock, Commands, Finished, RunFailedError
from scripts.gpu_check.compare import Curve, Verdict, compare_curves
from scripts.gpu_check.machine import Machine
from scripts.gpu_check.report import Result, print_table, write_json
from scripts.gpu_check.speed import judge_plan
from tests.support import ROOT

RIGHT = Curve([6.26, 6.07, 5.73], 6.25, 5.58)
BUILD = (
    "DeepSpeed's AsyncIO cannot be built: CUDA_HOME is not set; It needs g++, ninja, and libaio for"
    " NVMe: apt-get install"
)
MACHINE = Machine(
    device="cuda",
    cards=1,
    card="1 x Some Card, 80.0 GB",
    driver="570.1",
    versions={"torch": "2.13.0"},
)


@pytest.mark.parametrize(
    ("precision", "measured", "problems"),
    [
        ("fp32", RIGHT, 0),
        ("fp32", replace(RIGHT, losses=[6.26, 6.07, 5.7305]), 0),
        ("fp32", replace(RIGHT, losses=[6.26, 6.07, 5.74]), 1),
        ("bf16", replace(RIGHT, losses=[6.26, 6.07, 5.80]), 0),
        ("bf16", replace(RIGHT, losses=[6.26, 6.07, 5.90]), 1),
        ("bf16", replace(RIGHT, losses=[6.26, 6.07, math.nan]), 1),
        ("fp32", replace(RIGHT, losses=[6.26, 6.07]), 1),
        ("fp32", replace(RIGHT, losses=[]), 1),
        ("bf16", replace(RIGHT, after=math.nan), 2),
        # Every loss is within the tolerance of bf16, and the model learned nothing.
        ("bf16", Curve([6.26, 6.15, 5.84], 6.25, 6.25), 2),
    ],
)
def test_a_wrong_loss_makes_a_check_fail(
    precision: str, measured: Curve, problems: int, tmp_path: Path
) -> None:
    verdict = compare_curves(measured, RIGHT, precision)
    assert len(verdict.problems) == problems, verdict.problems
    assert run_one(lambda _: verdict, tmp_path).passed is (problems == 0)


def test_an_adapter_that_learned_nothing_is_told_by_the_held_out_loss() -> None:
    verdict = compare_curves(
        Curve([6.27, 6.25, 6.24], 6.25, 6.25), Curve([6.27, 6.2, 6.13], 6.25, 6.14), "bf16"
    )
    assert [problem.split(" is ")[0] for problem in verdict.problems] == [
        "the fall of the held-out loss"
    ]


def test_what_a_run_ends_with_decides_between_failed_and_skipped(tmp_path: Path) -> None:
    lacks = Finished(
        7,
        "",
        "error: precision=fp16: this CPU has no fp16 arithmetic; take precision=bf16 or fp32\n",
    )
    with pytest.raises(SkippedError, match="^precision=fp16: this CPU has no"):
        trained(lacks, tmp_path)
    # As planning says it of a V100.
    with pytest.raises(LlmtuneError) as refusal:
        _check_precision(
            Precision.bf16,
            Hardware(
                accelerator="cuda",
                device_count=1,
                device_memory_bytes=10**9,
                host_memory_bytes=10**9,
                name="V100",
                compute_capability=70,
            ),
        )
    old = Finished(refusal.value.exit_code, "", f"error: {refusal.value}\n")
    with pytest.raises(
        SkippedError, match=r"^precision=bf16: V100 \(compute capability 7.0\) has no bf16"
    ):
        trained(old, tmp_path)
    # A GPU that CUDA cannot use is no reason to skip.
    for broken in (
        Finished(7, "", "error: hardware.accelerator=cuda, but torch sees no CUDA device"),
        Finished(1, "", "x"),
    ):
        with pytest.raises(RunFailedError, match="exit code"):
            trained(broken, tmp_path)

    def skip(_: Bench) -> Verdict:
        raise SkippedError("no half precision here")

    def fail(_: Bench) -> Verdict:
        raise RunFailedError("exit code 3")

    skipped, failed = run_one(skip, tmp_path), run_one(fail, tmp_path)
    assert (skipped.state, skipped.skipped) == ("skipped", "no half precision here")
    assert (failed.state, failed.problems) == ("failed", ["exit code 3"])


@pytest.mark.parametrize(
    "said", ["offload on NVMe: DeepSpeed's AsyncIO op does not load (no nvcc)", BUILD]
)
def test_an_op_that_cannot_be_had_is_skipped_only_without_its_library(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = Finished(7, "", f"error: {said}\n")
    for has_library, kind in ((True, RunFailedError), (False, SkippedError)):
        monkeypatch.setattr("scripts.gpu_check.bench.has_libaio", lambda answer=has_library: answer)
        with pytest.raises(kind, match="AsyncIO"):
            trained(done, tmp_path)


def run_one(check: Any, folder: Path) -> Result:
    bench = Bench("cuda", folder, 1.0)
    try:
        return program.run_check(bench, Check(name="name", run=check))
    finally:
        bench.close()


def test_table_and_json_name_what_was_skipped_and_why(tmp_path: Path) -> None:
    results = [
        Result(
            name="a/right",
            passed=True,
            seconds=1.25,
            measured=RIGHT.to_dict(),
            expected=RIGHT.to_dict(),
            tolerance={"losses": 1e-4},
        ),
        Result(
            name="b/wrong",
            passed=False,
            seconds=2.0,
            problems=["the loss of step 1 is 7 instead of 6"],
        ),
        Result(name="c/absent", passed=None, seconds=0.5, skipped="this card has no bf16"),
    ]
    write_json(tmp_path / "new" / "report.json", MACHINE, results)
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    check_schema(report)
    assert [check["passed"] for check in report["checks"]] == [True, False, None]
    assert [check["skipped"] for check in report["checks"]] == [None, None, "this card has no bf16"]
    plain, colored = io.StringIO(), io.StringIO()
    print_table(Console(file=plain, width=140), MACHINE, results)
    print_table(
        Console(file=colored, width=140, force_terminal=True, color_system="standard"),
        MACHINE,
        results,
    )
    rows = {line.split()[1]: line for line in plain.getvalue().splitlines() if "/" in line}
    assert "passed" in rows["a/right"]
    assert "loss 6.2600 -> 5.7300" in rows["a/right"]
    assert "failed" in rows["b/wrong"]
    assert "step 1 is 7" in rows["b/wrong"]
    assert "skipped" in rows["c/absent"]
    assert "this card has no bf16" in rows["c/absent"]
    assert "\x1b[1;31mfailed" in colored.getvalue()
    assert "\x1b" not in plain.getvalue()


def check_schema(report: dict[str, Any]) -> None:
    assert list(report) == ["card", "driver", "versions", "date", "checks"]
    assert report["versions"]["torch"]
    assert report["checks"]
    keys = ["name", "passed", "seconds", "measured", "expected", "tolerance", "skipped", "problems"]
    assert all(list(check) == keys for check in report["checks"])


def test_the_plan_is_judged_by_what_torch_allocated() -> None:
    plan = {
        "world_size": 1,
        "batch": {"global_batch_size": 16},
        "hardware": {"accelerator": "cuda", "name": "Some Card", "flops": 1e15},
        "memory": {
            "device": {"weights": 4e9, "activations": 5e9, "runtime": 1.6e9},
            "host": {"runtime": 3e9},
        },
        "shape": {
            "matrix_parameters": 1e8,
            "attention_width": 500,
            "layers": 10,
            "adapter_parameters": 0,
        },
        "tokens_per_second": 16000.0,
    }
    steps = [
        {"seconds": seconds, "tokens": 16000, "memory_bytes": 8.1e9, "loss": 6.0 - seconds - number}
        for number, seconds in enumerate((9.0, 2.0, 1.5, 1.0, 1.0, 1.0))
    ]
    verdict = judge_plan(plan, steps, 1000)
    assert verdict.problems == []
    assert verdict.expected["peak_bytes"] == 9e9
    assert (verdict.expected["step_seconds"], verdict.measured["step_seconds"]) == (1.0, 1.0)
    # 3 passes of 2 operations a weight, and of attention.
    assert verdict.measured["mfu"] == pytest.approx(16000 * 3 * (2e8 + 2 * 1000 * 500 * 10) / 1e15)
    slow = [{**step, "seconds": 4.0, "memory_bytes": 11e9} for step in steps]
    assert len(judge_plan(plan, slow, 1000).problems) == 2
    for losses in ([6.0, None, 5.0, 4.0, 3.0, 2.0], [6.0] * 6):
        wrong = [{**step, "loss": loss} for step, loss in zip(steps, losses, strict=True)]
        assert len(judge_plan(plan, wrong, 1000).problems) == 1


def test_checks_are_chosen_by_pattern_or_by_part_of_their_name() -> None:
    checks = all_checks("cuda", 4)
    names = [check.name for check in checks]
    assert len(names) == len(set(names)) > 20
    assert len(select(checks, ["placement/*"])) == 10
    assert [check.name for check in select(checks, ["killed", "*/merged"])] == [
        "resume/killed",
        "export/merged",
    ]
    assert select(checks, []) == checks
    assert select(checks, ["nothing"]) == []


def test_every_tuner_and_every_optimizer_is_checked() -> None:
    names = [check.name for check in all_checks("cuda", 1)]
    for group, elsewhere in (("tuner", {"full", "lora"}), ("optimizer", {"adamw"})):
        folder = ROOT / "conf" / group.replace("optimizer", "optim")
        checked = {
            name.split("/")[1].split("-zero")[0] for name in names if name.startswith(f"{group}/")
        }
        assert checked | elsewhere == {path.stem for path in folder.glob("*.yaml")}


def test_results_are_kept_after_each_check(tmp_path: Path) -> None:
    kept: list[list[str]] = []
    bench = Bench("cpu", tmp_path, 1.0)
    checks = [
        Check(name=name, run=lambda _: Verdict(measured=1, expected=1, tolerance=0))
        for name in "ab"
    ]
    try:
        program.run_checks(bench, checks, lambda results: kept.append([r.name for r in results]))
    finally:
        bench.close()
    assert kept == [["a"], ["a", "b"]]


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtune.plan.devices.gpus.visible_gpus", list)
    assert program.main([]) == 7
    assert "error: no GPU: " in capsys.readouterr().err


@pytest.mark.process
def test_a_command_that_does_not_end_is_killed_with_its_ranks(tmp_path: Path) -> None:
    seen: dict[int, psutil.Process] = {}

    def look(process: subprocess.Popen[bytes]) -> None:
        for found in (
            psutil.Process(process.pid),
            *psutil.Process(process.pid).children(recursive=True),
        ):
            seen[found.pid] = found

    job = [
        "model=tiny",
        "data.max_seq_length=256",
        "hardware.accelerator=cpu",
        "train.max_steps=100000",
    ]
    with pytest.raises(RunFailedError, match="no end within 3 s"):
        Commands(tmp_path).llmtune(
            *job, f"output_dir={tmp_path / 'run'}", clock=Clock(3), watch=look
        )
    assert len(seen) > 1
    assert psutil.wait_procs(list(seen.values()), 5)[1] == []


@pytest.mark.process
def test_one_rung_with_the_cpu_in_the_place_of_the_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    assert (
        program.main(["--cpu", "--only", "placement/zero3-optimizer_cpu", "--out", str(out)]) == 0
    )
    report = json.loads(out.read_text())
    check_schema(report)
    (check,) = report["checks"]
    assert check["passed"] is True
    assert check["tolerance"]["losses"] == 1e-4
    assert check["measured"]["losses"] == pytest.approx(check["expected"]["losses"], rel=1e-4)
    assert check["measured"]["fall"] > 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"], "the work folder is left"
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "[1/1] placement/zero3-optimizer_cpu ..."
    assert said[1].startswith("[1/1] placement/zero3-optimizer_cpu: passed in ")


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.usefixtures("started_cold")
def test_all_of_it_with_the_cpu_in_the_place_of_the_gpu(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--cpu", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    check_schema(report)
    assert [check["name"] for check in report["checks"]] == [
        check.name for check in all_checks("cpu", 2)
    ]
    left_out = [check["name"] for check in report["checks"] if check["passed"] is None]
    assert all("fp16" in name for name in left_out), left_out

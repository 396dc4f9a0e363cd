"""The plan against what was measured: peak memory, seconds of a step, tokens a second, and the
share of the card's peak.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from scripts.gpu_check.compare import Verdict

#: The measured peak as a share of the planned one. A plan may ask for more than is used; a run that
#: needs more than was planned runs out of memory on a full card.
MEMORY_SHARE = (0.5, 1.15)
#: The measured step may take this many times as long as the planned one, or the planned one as the
#: measured. The cores of a CPU have other work too.
STEP_FACTOR = {"cuda": 3.0, "cpu": 10.0}


def compare_plan(run: Path, length: int) -> Verdict:
    """Compare ``plan.json`` with ``metrics.jsonl`` of a run whose rows are packed to ``length``
    tokens.
    """
    plan = json.loads((run / "plan.json").read_text())
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return judge_plan(plan, [line for line in lines if "loss" in line], length)


def judge_plan(plan: dict[str, Any], steps: list[dict[str, Any]], length: int) -> Verdict:
    """The same for what was read."""
    rows = plan["batch"]["global_batch_size"]
    planned_seconds = rows * length / plan["tokens_per_second"]
    planned_bytes = planned_peak_bytes(plan)
    # The first steps allocate, and the first kernels of a kind are looked for.
    settled = steps[min(3, len(steps) // 2) :]
    seconds = statistics.median(step["seconds"] for step in settled)
    tokens_per_second = sum(step["tokens"] for step in settled) / sum(
        step["seconds"] for step in settled
    )
    peak = max(step["memory_bytes"] for step in steps)
    mfu = (
        tokens_per_second
        * step_flops(plan, length)
        / (plan["hardware"]["flops"] * plan["world_size"])
    )
    measured = {
        "peak_bytes": peak,
        "step_seconds": seconds,
        "tokens_per_second": tokens_per_second,
        "mfu": mfu,
        "planned_for": plan["hardware"]["name"],
    }
    expected = {
        "peak_bytes": planned_bytes,
        "step_seconds": planned_seconds,
        "tokens_per_second": plan["tokens_per_second"],
    }
    factor = STEP_FACTOR[plan["hardware"]["accelerator"]]
    tolerance = {"peak_share": list(MEMORY_SHARE), "step_factor": factor}
    problems = _problems(peak / planned_bytes, seconds / planned_seconds, factor)
    losses = [step["loss"] for step in steps]
    if any(loss is None or not math.isfinite(loss) for loss in losses):
        problems.append("a loss is not finite")
    elif len(set(losses)) < len(losses):
        problems.append("two steps have the same loss to the last digit")
    return Verdict(measured=measured, expected=expected, tolerance=tolerance, problems=problems)


def planned_peak_bytes(plan: dict[str, Any]) -> int:
    """What the run's ``memory_bytes`` should reach: on a GPU what torch allocates on it, on a CPU
    the whole process.
    """
    memory = plan["memory"]
    device = sum(memory["device"].values())
    if plan["hardware"]["accelerator"] == "cpu":
        return int(device + sum(memory["host"].values()))
    return int(device - memory["device"]["runtime"])


def step_flops(plan: dict[str, Any], length: int) -> float:
    """Operations a token that training needs, without those of recomputed activations.

    A forward pass has two a weight, and causal attention's two products over half the positions
    before it. The backward pass has twice as many, but with adapters the gradients of the base's
    weights are not computed.
    """
    shape = plan["shape"]
    forward: float = (
        2.0 * shape["matrix_parameters"] + 2.0 * length * shape["attention_width"] * shape["layers"]
    )
    if shape["adapter_parameters"]:
        return 2 * forward + 6.0 * float(shape["adapter_parameters"])
    return 3 * forward


def _problems(memory: float, seconds: float, factor: float) -> list[str]:
    found = []
    if not MEMORY_SHARE[0] <= memory <= MEMORY_SHARE[1]:
        found.append(f"the peak of memory is {memory:.2f} times the planned one")
    if not 1 / factor <= seconds <= factor:
        found.append(f"a step takes {seconds:.2f} times as long as planned")
    return found

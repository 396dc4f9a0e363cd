"""Memory runs out at every start of a foreign launcher, until no rung is left."""

from __future__ import annotations

import io
import json
from pathlib import Path

from llmtune.config.compose import compose_config
from llmtune.errors import DoesNotFitError
from llmtune.plan.ladder import candidate_key, failure_conditions
from llmtune.plan.plan import Plan
from llmtune.plan.run_record import MemoryFailure
from llmtune.run.attempt import RunTarget
from llmtune.run.launched import _plan_next
from llmtune.track.console import Console

JOB = ["model=smollm2_360m", "tuner=full", "data.train=stdlib_docs@4", "hardware.accelerator=cpu"]
JOB += ["zero=3", "hardware.nvme_bytes=1TB", "hardware.host_memory_bytes=1TB"]


def failure_of(plan: Plan, number: int) -> MemoryFailure:
    return MemoryFailure(
        candidate=candidate_key(plan.placement, plan.batch, plan.recomputed),
        conditions=failure_conditions(plan.hardware, plan.world_size, None),
        time=float(number),
        rank=0,
        phase="step",
        step=1,
        peak_bytes=10,
        pool="host",
        message="std::bad_alloc",
    )


def test_the_last_rung_ends_with_3_once_and_is_tried_again_when_asked(tmp_path: Path) -> None:
    composed = compose_config([*JOB, f"offload.nvme_path={tmp_path}"])
    target = RunTarget(name="r", folder=tmp_path / "r")
    history: tuple[MemoryFailure, ...] = ()

    def start(is_new: bool) -> MemoryFailure:
        """The failure of one more start."""
        plan = _plan_next(composed, target, 1, history, is_new, Console(io.StringIO()))
        return failure_of(plan, len(history))

    refused: DoesNotFitError | None = None
    while refused is None and len(history) < 100:
        try:
            history = (*history, start(is_new=bool(history)))
        except DoesNotFitError as error:
            refused = error

    # A scheduler tries 75 again, and 3 never.
    assert refused is not None
    assert refused.exit_code == 3
    assert "data.max_seq_length" in str(refused)
    tried = [json.dumps(entry.candidate, sort_keys=True) for entry in history]
    assert len(set(tried)) == len(tried) > 1
    assert start(is_new=False).candidate == history[-1].candidate

"""kill -9 while the batch grows: the run goes on with the rows and sizes of the undisturbed one."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from llmtune.storage.hashing import hash_file
from tests.faults.conftest import Undisturbed
from tests.faults.harness import Run, read_lines

pytestmark = pytest.mark.process

#: Checkpoints are saved every four steps: at 8 where a size begins, and at 12 inside one.
STEPS = ["train.batch_schedule=[[0,4],[8,8],[14,24]]", "train.batch_schedule_lr=sqrt"]
TOKENS = ["train.batch_schedule=[[0,4],[3000,8],[9000,24]]", "train.batch_schedule_unit=tokens"]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["zero=2", *STEPS], id="steps"),
        pytest.param(["zero=3", *TOKENS], id="tokens", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_while_it_grows_ends_with_the_same_bytes(
    overrides: list[str], undisturbed: Undisturbed, tmp_path: Path
) -> None:
    overrides = [*overrides, "train.per_device_train_batch_size=2"]
    reference = undisturbed(*overrides)
    run = Run(tmp_path, overrides)
    try:
        run.start(slow={"step:*": 0.1})
        killed = 0.0
        # After the checkpoint of step 8 and before that of step 12; then inside the largest size.
        for step, victim in ((11, "1"), (16, "0")):
            begun = run.wait_for("step", step, victim, after=killed)
            time.sleep(max(0.0, begun + 0.05 - time.monotonic()))
            killed = time.monotonic()
            run.send(victim, signal.SIGKILL)
        assert run.end() == 0, run.console
        assert run.console.count("starting again") == 2
        losses, evaluations = read_lines(run.path)
        assert {step: values[-1] for step, values in losses.items()} == reference.losses
        assert {step: values[-1] for step, values in evaluations.items()} == reference.evaluations
        for folder in (run.path / "adapter", run.path / "model"):
            for file in folder.glob("*.safetensors"):
                other = reference.path / folder.name / file.name
                assert hash_file(file) == hash_file(other)
    finally:
        run.clean()

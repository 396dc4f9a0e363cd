"""A run that stops early and publishes its best model, killed three times: it ends at the same step
with the same bytes.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from llmtune.storage.manifest import find_damage
from tests.faults.harness import Run, read_lines

pytestmark = pytest.mark.process

#: Evaluations come every 3 steps and checkpoints every 5, so that most of the best are saved
#: between two checkpoints that are due.
BASE = [
    "model=tiny",
    "data.train=stdlib_docs@60",
    "data.val_set_size=16",
    "data.max_seq_length=256",
    "precision=fp32",
    "schedule=constant",
    "launch.nproc=2",
    "train.global_batch_size=8",
    "train.max_steps=60",
    "train.save_steps=5",
    "train.save_total_limit=1",
    "train.eval_steps=3",
    "train.load_best_model_at_end=true",
    "export=none",
    "train.sample_answers=false",
]
#: With what becomes of them: the best step and the last one.
LORA = ["tuner=lora", "zero=2", "optim.learning_rate=2e-2", "train.early_stopping_patience=3"]
FULL = [
    "tuner=full",
    "zero=3",
    "optim.learning_rate=1e-2",
    "train.early_stopping_patience=3",
    "checkpoint.background=false",
]
WRITE_SECONDS, EVALUATE_SECONDS = 0.02, 0.3


def read_folder(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def kill(run: Run) -> None:
    """End the supervisor, and the ranks with it."""
    run.send("supervisor", signal.SIGKILL)
    assert run.end() == -signal.SIGKILL
    assert run.count_orphans() == 0


@pytest.mark.parametrize(
    ("overrides", "result"),
    [
        pytest.param(LORA, "adapter", id="LoRA, ZeRO 2, background", marks=pytest.mark.slow),
        pytest.param(FULL, "model", id="full, ZeRO 3, at once", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_stops_early_ends_with_the_same_best_bytes_though_it_is_killed_three_times(
    overrides: list[str], result: str, tmp_path: Path
) -> None:
    undisturbed = Run(tmp_path / "undisturbed", overrides, BASE)
    run = Run(tmp_path / "killed", overrides, BASE)
    try:
        undisturbed.finish()
        wanted = json.loads((undisturbed.path / "finished.json").read_text())
        best, last = wanted["best"]["step"], wanted["step"]
        assert wanted["stopped_early"]
        assert wanted["published_step"] == best
        assert 3 < best < last < 60, "there is a best one in the middle"

        # In the save of the best checkpoint.
        run.start(slow={f"write:{best}": WRITE_SECONDS})
        run.wait_for("save", best)
        time.sleep(0.2)
        kill(run)
        assert f"checkpoint-{best}" not in run.complete(), "it was inside the save"
        # In an evaluation behind it.
        began = time.monotonic()
        run.start(slow={"evaluate:*": EVALUATE_SECONDS})
        run.wait_for("evaluate", best + 3, after=began)
        kill(run)
        assert f"checkpoint-{best}" in run.complete()
        # When all of the last checkpoint is written but its marker.
        run.start(gates=[f"file:{last}:COMPLETE"])
        run.wait_at(f"file:{last}:COMPLETE")
        kill(run)
        assert f"checkpoint-{best}" in run.complete()
        assert not (run.path / "finished.json").exists()
        run.finish()

        assert json.loads((run.path / "finished.json").read_text()) == wanted
        assert read_folder(run.path / result) == read_folder(undisturbed.path / result)
        assert find_damage(run.path / result) == []
        assert read_lines(run.path)[1] == read_lines(undisturbed.path)[1], "each is there once"
        assert run.complete().keys() == undisturbed.complete().keys()
        assert run.complete().keys() == {f"checkpoint-{best}", f"checkpoint-{last}"}

        # The same command has nothing to do, and does not train on.
        run.finish()
        assert f"stopped early: eval_loss did not improve in {wanted['stale_evaluations']}" in (
            run.console
        )
        assert json.loads((run.path / "finished.json").read_text()) == wanted
    finally:
        for each in (undisturbed, run):
            each.clean()

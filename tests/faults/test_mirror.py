"""A mirror that fails twice, and a run that has only its mirror left."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llmtune.checkpoint.manifest import find_damage
from tests.faults.conftest import Undisturbed
from tests.faults.harness import KEPT, STEPS, Run, Table, judge, judge_folder, judge_losses

pytestmark = [pytest.mark.process, pytest.mark.slow]


def mirrored(tmp_path: Path) -> tuple[Run, dict[str, str], Path]:
    """A run with a mirror whose first two uploads fail."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    run = Run(tmp_path / "r", ["zero=2", "checkpoint.mirror=broken://bucket", "run_name=mirrored"])
    return run, {"FAULT_MIRROR": str(mirror), "FAULT_MIRROR_FAILURES": "2"}, mirror / "bucket" / "mirrored"


def test_a_mirror_that_fails_twice_has_all_checkpoints_in_the_end(
    undisturbed: Undisturbed, table: Table, tmp_path: Path
) -> None:
    reference = undisturbed("zero=2")
    run, env, there = mirrored(tmp_path)
    with table.trial("a mirror that fails twice", "copies", run) as trial:
        run.finish(env=env)
        assert sum("mirror fails" in event["event"] for event in run.events()) == 2
        copies = sorted(folder.name for folder in there.iterdir())
        assert copies == sorted(run.complete()), "those that are kept here are kept there"
        assert len(copies) == KEPT
        trial.wrong += [problem for name in copies for problem in find_damage(there / name)]
        judge(run, trial, reference, None)


def test_a_run_goes_on_from_its_mirror_when_its_folder_is_gone(
    undisturbed: Undisturbed, table: Table, tmp_path: Path
) -> None:
    reference = undisturbed("zero=2")
    run, env, there = mirrored(tmp_path)
    with table.trial("folder lost, gone on from a mirror that failed twice", f"stopped before {STEPS}", run) as trial:
        run.start(gates=["step:18"], env=env)
        run.wait_at("step:18")
        run.wait_until(lambda: (there / "checkpoint-16" / "COMPLETE").exists() or None, "checkpoint-16 at the mirror")
        assert run.process is not None
        run.process.kill()
        run.end()
        trial.orphans += run.count_orphans()
        done = run.last_step(1e18)
        shutil.rmtree(run.path)
        run.finish(env={**env, "FAULT_MIRROR_FAILURES": "0"})
        assert run.resumed_step() == 16, run.console
        trial.lost_steps = done - 16
        trial.orphans += run.count_orphans()
        # The metrics so far came with the checkpoint.
        trial.wrong += judge_losses(run.path, reference) + judge_folder(run)
        trial.resumed = True

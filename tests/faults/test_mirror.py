"""A mirror that fails twice, a run that has only its mirror left, and a mirror that a stranger has
filled.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llmtune.storage import layout
from llmtune.storage.manifest import find_damage
from tests.faults.conftest import Undisturbed
from tests.faults.harness import (
    KEPT,
    STEPS,
    Reference,
    Run,
    Table,
    judge,
    judge_folder,
    judge_losses,
)

pytestmark = pytest.mark.process


def mirrored(tmp_path: Path) -> tuple[Run, dict[str, str], Path]:
    """A run with a mirror whose first two uploads fail."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    run = Run(tmp_path / "r", ["zero=2", "checkpoint.mirror=broken://bucket", "run_name=mirrored"])
    return (
        run,
        {"FAULT_MIRROR": str(mirror), "FAULT_MIRROR_FAILURES": "2"},
        mirror / "bucket" / "mirrored",
    )


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_goes_on_from_its_mirror_when_its_folder_is_gone(
    undisturbed: Undisturbed, table: Table, tmp_path: Path
) -> None:
    reference = undisturbed("zero=2")
    run, env, there = mirrored(tmp_path)
    with table.trial(
        "folder lost, gone on from a mirror that failed twice", f"stopped before {STEPS}", run
    ) as trial:
        run.start(gates=["step:18"], env=env)
        run.wait_at("step:18")
        run.wait_until(
            lambda: (there / "checkpoint-16" / "COMPLETE").exists() or None,
            "checkpoint-16 at the mirror",
        )
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


def lay_strangers_copies(place: Path, reference: Reference) -> dict[Path, bytes]:
    """Checkpoints of another run at this one's place, one of a step that this one comes to, and one
    that was cut off.
    """
    for step in (STEPS, 2 * STEPS):
        shutil.copytree(reference.path / f"checkpoint-{STEPS}", place / f"checkpoint-{step}")
    (place / f"checkpoint-{2 * STEPS}" / layout.COMPLETE).unlink()
    place.with_name(f"{place.name}.owner").write_text("somebody else")
    return read_all(place.parent)


def read_all(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_stranger_who_comes_to_the_mirror_in_mid_run_keeps_every_byte(
    undisturbed: Undisturbed, table: Table, tmp_path: Path
) -> None:
    reference = undisturbed("zero=2")
    place = tmp_path / "mirror" / "mirrored"
    run = Run(
        tmp_path / "r", ["zero=2", f"checkpoint.mirror={tmp_path}/mirror", "run_name=mirrored"]
    )
    with table.trial("a mirror with a stranger's copies", "they come in mid-run", run) as trial:
        run.start(gates=["step:2"])
        run.wait_at("step:2")
        strangers = lay_strangers_copies(place, reference)
        run.open("step:2")
        assert run.end() == 0, run.console
        said = " ".join(run.console.split())
        assert (
            "the place belongs to another run; take another run_name= or checkpoint.mirror=" in said
        ), said
        trial.wrong += (
            [] if read_all(tmp_path / "mirror") == strangers else ["the stranger's copies changed"]
        )
        judge(run, trial, reference, None)


@pytest.mark.parametrize(
    ("what", "overrides", "said"),
    [
        ("a new run", ["resume_from_checkpoint=none"], "that another run has filled"),
        pytest.param(
            "a run from PATH",
            ["resume_from_checkpoint=PATH"],
            "that another run has filled",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "another configuration",
            ["optim.weight_decay=0.5"],
            "another run_name= or checkpoint.mirror=",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_a_stranger_has_filled_is_refused_and_nothing_of_it_is_taken(
    what: str,
    overrides: list[str],
    said: str,
    undisturbed: Undisturbed,
    table: Table,
    tmp_path: Path,
) -> None:
    reference = undisturbed("zero=2")
    own = [text.replace("PATH", str(reference.path / f"checkpoint-{STEPS}")) for text in overrides]
    run = Run(
        tmp_path / "r",
        ["zero=2", f"checkpoint.mirror={tmp_path}/mirror", "run_name=mirrored", *own],
    )
    with table.trial("a mirror with a stranger's copies", what, run) as trial:
        strangers = lay_strangers_copies(tmp_path / "mirror" / "mirrored", reference)
        run.start()
        assert run.end() == 5, run.console
        assert said in " ".join(run.console.split()), run.console
        trial.orphans += run.count_orphans()
        trial.wrong += (
            [] if read_all(tmp_path / "mirror") == strangers else ["the stranger's copies changed"]
        )
        trial.wrong += [f"{name} was fetched" for name in run.complete()]
        # With a place of its own it begins, in the same folder.
        if what == "another configuration":
            run.start(
                f"checkpoint.mirror={tmp_path}/elsewhere",
                "train.max_steps=1",
                "train.eval_steps=null",
            )
            assert run.end() == 0, run.console
        trial.resumed = True

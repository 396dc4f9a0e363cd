"""Files of the newest checkpoint lose a bit, their end, or all: the damage is named, and the
checkpoint before is taken.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtune.config.stored import load_config
from llmtune.storage.manifest import find_damage
from llmtune.train.resume import resume_point
from llmtune.train.run_folder import RunFolder
from tests.faults.conftest import Undisturbed
from tests.faults.harness import SAVE_STEPS, STEPS, Reference, Run, Table, copy_run, judge

pytestmark = pytest.mark.process

LAST, BEFORE = f"checkpoint-{STEPS}", f"checkpoint-{STEPS - SAVE_STEPS}"
FILES = (
    "adapter_model.safetensors",
    "optimizer-00000-of-00002.safetensors",
    "optimizer-00001-of-00002.safetensors",
    "trainer_state.json",
    "manifest.json",
    "COMPLETE",
    "config.yaml",
    "tokenizer.json",
    "metrics.jsonl",
    *("adapter_config.json", "tokenizer_config.json", "chat_template.jinja"),
)
#: Bits tried in each file.
BITS = 8


def flip(file: Path, bit: int) -> None:
    """Turn over one bit in place, which changes neither size nor time stamp."""
    before = file.stat()
    with file.open("r+b") as data:
        data.seek(bit // 8)
        value = data.read(1)[0]
        data.seek(bit // 8)
        data.write(bytes([value ^ (1 << bit % 8)]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip_any(file: Path, drawn: random.Random) -> None:
    """A bit anywhere."""
    flip(file, drawn.randrange(file.stat().st_size * 8))


def truncate(file: Path, drawn: random.Random) -> None:
    """The end is gone."""
    os.truncate(file, drawn.randrange(file.stat().st_size))


def remove(file: Path, _: random.Random) -> None:
    """The file is gone."""
    file.unlink()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "a bit flipped": flip_any,
    "truncated": truncate,
    "removed": remove,
}


def choose(run: Run) -> tuple[str | None, str]:
    """The checkpoint that this run would go on from, and what is said of those passed over."""
    said: list[str] = []
    found = resume_point(
        RunFolder(run.path), load_config(run.path / "config.yaml"), "run", said.append
    )
    return found.name if found else None, "\n".join(said)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_damage_to_a_file_of_the_newest_checkpoint_is_found(
    name: str, undisturbed: Undisturbed, table: Table, tmp_path: Path
) -> None:
    """In this process, so that many can be tried."""
    run = copy_run(undisturbed("zero=2"), tmp_path)
    file = run.path / LAST / name
    whole = file.read_bytes()
    drawn = random.Random(name)
    for number in range(BITS + 2):
        damage = list(DAMAGES)[max(0, number - BITS + 1)]
        with table.trial(f"{damage} (checked only)", f"{name} {number}") as trial:
            DAMAGES[damage](file, drawn)
            assert file.exists() is (damage != "removed")
            chosen, said = choose(run)
            if chosen != BEFORE:
                trial.wrong.append(f"{name} was damaged, and {chosen} taken")
            # A folder without the marker was never finished.
            if (damage, name) != ("removed", "COMPLETE"):
                assert f"{LAST} is damaged and skipped" in said
                assert name in said, said
            trial.resumed = True
            file.write_bytes(whole)
    assert choose(run) == (LAST, ""), "whole again"


def go_on(run: Run, trial_reference: Reference) -> None:
    """Resume for real, and see that the damaged folder was not touched but for its name."""
    run.finish()
    assert run.resumed_step() == STEPS - SAVE_STEPS, run.console
    assert find_damage(run.path / LAST) == []
    assert trial_reference.path != run.path


REAL = [
    pytest.param(name, damage, id=f"{name} {damage}", marks=pytest.mark.slow)
    for name, damage in (
        ("adapter_model.safetensors", "a bit flipped"),
        ("optimizer-00001-of-00002.safetensors", "truncated"),
        ("trainer_state.json", "a bit flipped"),
        ("manifest.json", "truncated"),
        ("manifest.json", "a bit flipped"),
        ("COMPLETE", "a bit flipped"),
        ("COMPLETE", "removed"),
        ("config.yaml", "a bit flipped"),
        ("tokenizer.json", "truncated"),
        ("metrics.jsonl", "a bit flipped"),
        ("adapter_config.json", "removed"),
    )
]
REAL += [
    pytest.param(name, damage, id=f"chosen: {name} {damage}")
    for name, damage in (
        ("optimizer-00000-of-00002.safetensors", "a bit flipped"),
        ("adapter_model.safetensors", "truncated"),
    )
]


@pytest.mark.parametrize(("name", "damage"), REAL)
def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(
    name: str, damage: str, undisturbed: Undisturbed, table: Table, tmp_path: Path
) -> None:
    reference = undisturbed("zero=2")
    run = copy_run(reference, tmp_path)
    with table.trial(f"{damage}, and gone on", name, run) as trial:
        DAMAGES[damage](run.path / LAST / name, random.Random(name + damage))
        go_on(run, reference)
        if (damage, name) != ("removed", "COMPLETE"):
            assert f"{LAST} is damaged and skipped: {name}" in run.console or name == "COMPLETE", (
                run.console
            )
        trial.lost_steps = STEPS - run.resumed_step()
        judge(run, trial, reference, None)


@pytest.mark.slow
def test_a_damaged_model_of_full_fine_tuning_is_passed_over(
    undisturbed: Undisturbed, table: Table, tmp_path: Path
) -> None:
    overrides = ("zero=3", "tuner=full")
    reference = undisturbed(*overrides)
    run = copy_run(reference, tmp_path, overrides)
    with table.trial("a bit flipped, and gone on", "model.safetensors (tuner=full)", run) as trial:
        flip_any(run.path / LAST / "model.safetensors", random.Random(0))
        go_on(run, reference)
        assert f"{LAST} is damaged and skipped: model.safetensors has other contents" in run.console
        trial.lost_steps = STEPS - run.resumed_step()
        judge(run, trial, reference, None)


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_left_alone(
    undisturbed: Undisturbed, table: Table, tmp_path: Path
) -> None:
    reference = undisturbed("zero=2")
    run = copy_run(reference, tmp_path)
    with table.trial("every checkpoint damaged", "all", run) as trial:
        whole = {}
        for folder in (LAST, BEFORE):
            file = run.path / folder / "trainer_state.json"
            whole[file] = file.read_bytes()
            flip(file, 8)
        lines = (run.path / "metrics.jsonl").read_bytes()
        run.start()
        assert run.end() == 5, run.console
        assert "every checkpoint in it is damaged" in run.console
        assert (run.path / "metrics.jsonl").read_bytes() == lines
        for file, data in whole.items():
            file.write_bytes(data)
        run.finish()
        judge(run, trial, reference, None)

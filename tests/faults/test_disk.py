"""The disk is full at each file of a save in turn, or the folder can suddenly not be written: exit
5, and nothing is lost.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Undisturbed
from tests.faults.harness import (
    Run,
    Table,
    can_mount,
    fill,
    find_lost,
    judge,
    small_disk,
    take_snapshot,
)

pytestmark = [pytest.mark.process, pytest.mark.slow]

STEP = 12
#: All files of a save in the order in which they are written; ``written-`` is what a rank tells
#: rank 0.
FILES = (
    "adapter_model.safetensors",
    "optimizer-00000-of-00002.safetensors",
    "optimizer-00001-of-00002.safetensors",
    "written-00000.json",
    "written-00001.json",
    "adapter_config.json",
    "chat_template.jinja",
    "config.yaml",
    "metrics.jsonl",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "manifest.json",
    "COMPLETE",
)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Eight megabytes."""
    if not can_mount(tmp_path):
        pytest.skip("a small disk is a tmpfs, and mounting is not permitted here")
    with small_disk(tmp_path / "disk") as folder:
        yield folder


@pytest.mark.parametrize(
    ("name", "background"),
    [(name, "false" if number % 2 else "true") for number, name in enumerate(FILES)],
)
def test_a_disk_that_fills_up_at_any_file_of_a_save_loses_nothing(
    name: str, background: str, undisturbed: Undisturbed, table: Table, disk: Path
) -> None:
    reference = undisturbed("zero=2")
    run = Run(disk / "r", ["zero=2", f"checkpoint.background={background}"])
    gate = f"file:{STEP}:{name}"
    with table.trial(
        "disk full at each file of a save", f"{name}, background={background}", run
    ) as trial:
        run.start(gates=[gate])
        run.wait_at(gate)
        snapshot = take_snapshot(run, time.monotonic())
        ballast = fill(disk)
        run.open(gate)
        code = run.end()
        assert code == 5, (code, run.console)
        assert "No space left on device" in run.console
        trial.wrong += find_lost(run, snapshot)
        trial.orphans += run.count_orphans()
        snapshot.step = run.last_step(time.monotonic())
        ballast.unlink()
        run.finish()
        judge(run, trial, reference, snapshot)


def test_a_save_that_does_not_fit_is_left_out_where_that_is_wanted(
    undisturbed: Undisturbed, table: Table, disk: Path
) -> None:
    reference = undisturbed("zero=2")
    run = Run(disk / "r", ["zero=2", "checkpoint.on_disk_low=skip"])
    gate = f"file:{STEP}:adapter_model.safetensors"
    with table.trial(
        "disk full, checkpoint.on_disk_low=skip", "adapter_model.safetensors", run
    ) as trial:
        # The step waits until there is room again for its line of metrics.
        run.start(gates=[gate, f"step:{STEP + 1}@0"])
        run.wait_at(gate)
        snapshot = take_snapshot(run, time.monotonic())
        ballast = fill(disk)
        run.open(gate)
        run.wait_at(f"step:{STEP + 1}@0")
        time.sleep(1.0)
        ballast.unlink()
        run.open(f"step:{STEP + 1}@0")
        code = run.end()
        assert code == 0, (code, run.console)
        assert "training continues" in run.console
        assert f"checkpoint-{STEP} was not saved" in run.console
        trial.wrong += find_lost(run, snapshot)
        judge(run, trial, reference, None)


def test_a_disk_that_is_too_small_from_the_start_is_refused_before_the_first_step(
    undisturbed: Undisturbed, table: Table, disk: Path
) -> None:
    reference = undisturbed("zero=2")
    run = Run(disk / "r", ["zero=2"])
    with table.trial("disk full from the start", "before the first step", run) as trial:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(7 << 20))
        run.start()
        code = run.end()
        assert code == 5, (code, run.console)
        assert "checkpoint.on_disk_low=prune" in run.console
        assert run.last_step(time.monotonic()) == 0
        ballast.unlink()
        run.finish()
        judge(run, trial, reference, None)


def bind_read_only(folder: Path) -> None:
    """Lay the folder over itself, read-only: files that are open stay writable, new ones cannot be
    made.
    """
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)


@pytest.mark.parametrize("gate", ["step:10", "file:12:manifest.json"])
def test_a_folder_that_becomes_read_only_ends_the_run_and_loses_nothing(
    gate: str, undisturbed: Undisturbed, table: Table, disk: Path
) -> None:
    reference = undisturbed("zero=2")
    run = Run(disk / "r", ["zero=2"])
    with table.trial("output folder read-only in mid-run", gate, run) as trial:
        run.start(gates=[gate])
        run.wait_at(gate)
        bind_read_only(run.path)
        try:
            snapshot = take_snapshot(run, time.monotonic())
            run.open(gate)
            code = run.end()
            assert code == 5, (code, run.console)
            assert "Read-only file system" in run.console
            trial.wrong += find_lost(run, snapshot)
            trial.orphans += run.count_orphans()
            snapshot.step = run.last_step(time.monotonic())
            run.start()
            code = run.end()
            assert (code, "not writable" in run.console) == (5, True), (code, run.console)
        finally:
            subprocess.run(["umount", "-l", str(run.path)], check=True)
        run.finish()
        judge(run, trial, reference, snapshot)


def test_a_read_only_place_is_refused_at_once(
    undisturbed: Undisturbed, table: Table, disk: Path
) -> None:
    reference = undisturbed("zero=2")
    run = Run(disk / "r", ["zero=2"])
    with table.trial("output folder read-only from the start", "at once", run) as trial:
        bind_read_only(disk / "r")
        try:
            run.process = None
            run.traces = disk.parent / "traces"
            run.traces.mkdir()
            run.start()
            assert run.end() == 5, run.console
            assert "Read-only file system; take another output_dir=" in run.console
        finally:
            subprocess.run(["umount", "-l", str(disk / "r")], check=True)
        run.finish()
        judge(run, trial, reference, None)

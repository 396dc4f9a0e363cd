"""A run folder's small files are whole or not there: a full disk or an end in the middle blocks no
later start.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmtune.errors import CheckpointError
from llmtune.plan.run_record import RunRecord
from llmtune.storage import layout
from llmtune.storage.lock import hold_lock
from llmtune.storage.plain_fields import from_plain
from llmtune.storage.rank_files import SkippedSteps
from llmtune.train.resume import resume_point
from llmtune.train.run_folder import RunFolder
from tests.faults.harness import can_mount, fill, small_disk
from tests.support import ROOT
from tests.train.test_resume import config_of as compose
from tests.train.test_resume import make

config_of = functools.cache(compose)


def start(run: Path) -> None:
    folder, config = RunFolder(run), config_of()
    folder.find_changes(config)
    resume_from = resume_point(folder, config, "r", lambda _: None)
    step = -1 if resume_from is None else 4
    record = from_plain(RunRecord, {"run_id": "a", "data": {"fingerprint": "x"}})
    folder.begin(config, ["seed=42"], record, step, resume_from)


def describing(run: Path) -> dict[str, bytes]:
    return {
        name: (run / name).read_bytes()
        for name in (layout.CONFIG, layout.OVERRIDES, layout.PLAN, layout.ENVIRONMENT)
    }


@pytest.mark.process
def test_a_full_disk_leaves_the_description_of_the_run_as_it_was(tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("a small disk is a tmpfs, and mounting is not permitted here")
    with small_disk(tmp_path / "disk") as disk:
        run = disk / "run"
        run.mkdir()
        start(run)
        make(run, 4, config_of())
        (run / layout.METRICS).write_text('{"step": 1, "loss": 1.0}\n')
        before = describing(run)
        ballast = fill(disk)
        for _ in range(2):
            with hold_lock(run / layout.LOCK):
                with pytest.raises(
                    CheckpointError, match=r"No space left on device\. Free space there"
                ) as refusal:
                    start(run)
                assert refusal.value.exit_code == 5
        assert describing(run) == before
        ballast.unlink()
        start(run)


def test_what_a_crash_of_the_machine_cut_off_is_passed_over(tmp_path: Path) -> None:
    start(tmp_path)
    make(tmp_path, 4, config_of())
    folder = RunFolder(tmp_path)
    assert folder.read_record().run_id == "a"
    for text in ("", '{"step"', '{"run_id": "a"'):
        for name in (layout.PLAN, layout.FINISHED, layout.SKIPPED_STEPS):
            (tmp_path / name).write_text(text)
        assert folder.finished_step is None
        assert folder.read_record() == RunRecord()
        assert SkippedSteps.read(tmp_path) == SkippedSteps()
        start(tmp_path)
        assert folder.read_record().run_id == "a"


#: Ends the process as ``kill -9`` does, at the moment that is named, while a start describes its
#: run.
KILLED = """
import os, sys
from pathlib import Path
from tests.train.test_run_folder import start
at, calls = int(sys.argv[2]), 0
fsync, replace = os.fsync, os.replace
def counted(act):
    def do(*given):
        global calls
        calls += 1
        if calls == at:
            os._exit(9)
        return act(*given)
    return do
os.fsync, os.replace = counted(fsync), counted(replace)
start(Path(sys.argv[1]))
"""


@pytest.mark.process
@pytest.mark.parametrize("moment", range(1, 9))
def test_a_first_start_that_is_killed_anywhere_does_not_stand_in_the_way_of_the_next(
    moment: int, tmp_path: Path
) -> None:
    (tmp_path / ".nfs0001").touch()
    (tmp_path / layout.LOG).touch()
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(moment)], cwd=ROOT, check=False
    )
    assert killed.returncode == 9
    start(tmp_path)
    assert json.loads((tmp_path / layout.PLAN).read_text())["run_id"] == "a"
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize(
    "name", [".seen-by-all-3f", ".nfs000012", ".DS_Store", "SAVE", "train.log", ".plan.json.part"]
)
def test_marks_of_our_own_and_of_file_systems_make_no_folder_a_strangers(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / name).touch()
    assert RunFolder(tmp_path).find_changes(config_of()) == []


@pytest.mark.parametrize("name", ["notes.txt", "model", "checkpoint-4"])
def test_anything_else_does(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=f"not a run folder .it holds {name}"):
        RunFolder(tmp_path).find_changes(config_of())


def test_nothing_in_a_run_folder_is_written_in_place() -> None:
    """But for files that grow, of which readers pass over a line that is cut off."""
    for file in (
        *(ROOT / "llmtune" / "train").glob("*.py"),
        ROOT / "llmtune" / "track" / "metrics.py",
    ):
        assert not re.search(r"\.write_(text|bytes)\(|open\(\"w", file.read_text()), file

"""What a run has gone back behind stays behind: here, at its mirror, and after the next stop."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from llmtune.checkpoint.find import find_checkpoints
from llmtune.checkpoint.mirror import Mirror
from llmtune.checkpoint.trainer_state import read_trainer_state
from llmtune.errors import CheckpointError, ConfigError
from llmtune.plan.run_record import RunRecord
from llmtune.storage import layout, remote
from llmtune.train.begun import begun_train
from llmtune.train.mirror_owner import resolve_run_id, withdraw_left_copies
from llmtune.train.resume import began_from, resume_point
from llmtune.train.run_folder import RunFolder
from tests.train.test_resume import config_of as compose
from tests.train.test_resume import damage, make

config_of = functools.cache(compose)


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.0)


def begin(run: Path, *overrides: str, said: list[str] | None = None) -> Path | None:
    """A start up to the moment in which its ranks would train; where it goes on from."""
    run.mkdir(parents=True, exist_ok=True)
    config, folder = config_of(*overrides), RunFolder(run)
    notes: list[str] = [] if said is None else said
    say = notes.append
    folder.find_changes(config)
    resume_from = resume_point(folder, config, "r", say)
    run_id = resolve_run_id(folder, config, "r", resume_from, say)
    step = -1 if resume_from is None else read_trainer_state(resume_from).step
    record = RunRecord(run_id=run_id, run_name="r", began_from=began_from(folder, config))
    if resume_from is not None:
        withdraw_left_copies(config, "r", run_id, folder.first_left(step, resume_from), say)
    for note in folder.begin(config, [], record, step, resume_from):
        say(note)
    return resume_from


def copy(run: Path, mirror: Path, *steps: int) -> None:
    """Save and copy, as a run does that keeps everything."""
    copies = Mirror(str(mirror), "r", print, RunFolder(run).read_record().run_id or "")
    for step in steps:
        copies.put(make(run, step, config_of()), None)
    assert copies.finish(30) == []


def there(mirror: Path) -> list[str]:
    return [folder.name for folder in find_checkpoints(mirror / "r")]


def here(run: Path) -> list[str]:
    return [folder.name for folder in find_checkpoints(run)]


@pytest.mark.parametrize("place", ["the run folder", "the mirror"])
@pytest.mark.parametrize("lost", [False, True], ids=["the folder stays", "the folder is lost"])
def test_a_run_that_went_back_stays_back_after_a_stop(
    place: str, lost: bool, tmp_path: Path
) -> None:
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    copies = f"checkpoint.mirror={mirror}"
    assert begin(run, copies) is None
    copy(run, mirror, 4, 8, 12)
    path = run / "checkpoint-8" if place == "the run folder" else mirror / "r" / "checkpoint-8"
    back, said = f"resume_from_checkpoint={path}", list[str]()
    assert begin(run, copies, back, said=said) == run / "checkpoint-8"
    assert (
        f"checkpoint-12 at checkpoint.mirror={mirror}: withdrawn, no run resumes from them any more"
        in said
    )
    assert (
        f"checkpoint-12 does not follow from {run}/checkpoint-8 and was renamed to"
        " superseded-checkpoint-12" in said
    )
    left = ["checkpoint-4", "checkpoint-8"]
    assert (here(run), there(mirror)) == (left, left)
    # Killed before anything was saved, and queued again.
    if lost:
        shutil.rmtree(run)
        assert begin(run, copies) == run / "checkpoint-8"
    assert begin(run, copies, back) == run / "checkpoint-8"
    copy(run, mirror, 10)
    assert begin(run, copies, back) == run / "checkpoint-10"
    assert begin(run, copies) == run / "checkpoint-10"


def test_a_certain_copy_is_taken_into_an_empty_folder(tmp_path: Path) -> None:
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    copies = f"checkpoint.mirror={mirror}"
    begin(run, copies)
    copy(run, mirror, 4, 8, 12)
    shutil.rmtree(run)
    url = f"resume_from_checkpoint=file://{mirror}/r/checkpoint-8"
    assert begin(run, f"checkpoint.mirror=file://{mirror}", url) == run / "checkpoint-8"
    assert there(mirror) == ["checkpoint-4", "checkpoint-8"]


def test_a_checkpoint_of_the_same_step_on_another_way_is_not_gone_on_from(tmp_path: Path) -> None:
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    copies = f"checkpoint.mirror={mirror}"
    begin(run, copies)
    copy(run, mirror, 4, 8)
    path = make(tmp_path / "other", 8, config_of())
    for _ in range(2):
        assert begin(run, copies, f"resume_from_checkpoint={path}") == path
    assert (here(run), there(mirror)) == (["checkpoint-4"], ["checkpoint-4"])
    assert (run / "superseded-checkpoint-8" / "COMPLETE").is_file(), "and it is not lost"


def test_where_a_path_begins_is_its_own_step_and_not_where_the_run_stood_then(
    tmp_path: Path,
) -> None:
    """Else a newest checkpoint that is damaged throws the run back behind all that it has."""
    run = tmp_path / "run"
    path = make(tmp_path / "other", 4, config_of())
    begin(run)
    make(run, 8, config_of())
    newest = make(run, 12, config_of())
    assert begin(run, f"resume_from_checkpoint={path}") == newest
    damage(newest)
    assert begin(run, f"resume_from_checkpoint={path}") == run / "checkpoint-8"


def test_copies_of_another_run_are_neither_fetched_nor_withdrawn(tmp_path: Path) -> None:
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    begin(tmp_path / "first", f"checkpoint.mirror={mirror}")
    copy(tmp_path / "first", mirror, 4, 8)
    before = {file: file.read_bytes() for file in mirror.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError) as refusal:
        begin(run, f"checkpoint.mirror={mirror}", "seed=7")
    assert "seed: 42 there, 7 now" in str(refusal.value)
    assert "another run_name= or checkpoint.mirror=" in str(refusal.value)
    assert here(run) == [], "nothing of it stands in the way of the next start"
    assert begin(run, f"checkpoint.mirror={tmp_path}/elsewhere", "seed=7") is None
    path = make(tmp_path / "other", 2, config_of("seed=7"))
    with pytest.raises(CheckpointError):
        begin(run, f"checkpoint.mirror={mirror}", "seed=7", f"resume_from_checkpoint={path}")
    assert {file: file.read_bytes() for file in mirror.rglob("*") if file.is_file()} == before


def test_a_damaged_copy_is_passed_over_as_a_damaged_checkpoint_is(tmp_path: Path) -> None:
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    copies, said = f"checkpoint.mirror={mirror}", list[str]()
    begin(run, copies)
    copy(run, mirror, 4, 8)
    damage(mirror / "r" / "checkpoint-8")
    damage(run / "checkpoint-8")
    assert begin(run, copies, said=said) == run / "checkpoint-4"
    assert any(f"skipped: {mirror}/r/checkpoint-8" in line for line in said), said
    shutil.rmtree(run)
    assert begin(run, copies) == run / "checkpoint-4"
    damage(mirror / "r" / "checkpoint-4")
    shutil.rmtree(run)
    with pytest.raises(CheckpointError, match="checkpoint-4 was not read"):
        begin(run, copies)


def test_none_refuses_a_place_with_copies_even_where_the_mark_is_its_own(tmp_path: Path) -> None:
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    copies = f"checkpoint.mirror={mirror}"
    begin(run, copies)
    copy(run, mirror, 4)
    shutil.rmtree(run / "checkpoint-4")
    with pytest.raises(CheckpointError, match="checkpoints: checkpoint-4"):
        begin(run, copies, "resume_from_checkpoint=none")
    assert there(mirror) == ["checkpoint-4"]
    shutil.rmtree(mirror / "r")
    assert begin(run, copies, "resume_from_checkpoint=none") is None
    (run / layout.PLAN).unlink()
    (mirror / "r.owner").write_text("another")
    with pytest.raises(CheckpointError, match=r"none are left; r\.owner names the owner"):
        begin(run, copies, "resume_from_checkpoint=none")


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_the_run_folder_is_no_mirror_of_itself(prefix: str, tmp_path: Path) -> None:
    run = tmp_path / "r"
    make(run, 4, config_of())
    with pytest.raises(ConfigError, match="which is the run folder itself; name another"):
        begin(run, f"checkpoint.mirror={prefix}{tmp_path}")
    assert begin(run, f"checkpoint.mirror={prefix}{run}") == run / "checkpoint-4", (
        "a place within it is another"
    )


def test_a_run_folder_for_a_checkpoint_is_told_which_there_are(tmp_path: Path) -> None:
    make(tmp_path / "first", 4, config_of())
    newest = make(tmp_path / "first", 8, config_of())
    with pytest.raises(
        CheckpointError, match=f"is a run folder: name one of its checkpoints, of which {newest} is"
    ):
        begin(tmp_path / "second", f"resume_from_checkpoint={tmp_path}/first")
    with pytest.raises(CheckpointError, match="no such folder"):
        begin(tmp_path / "second", f"resume_from_checkpoint={tmp_path}/nothing")


def test_what_a_run_began_from_counts_until_it_has_saved_something(tmp_path: Path) -> None:
    """A later command need not name it again: it would train the base instead, and say nothing."""
    rows = "train.global_batch_size=24"
    run, path, said = tmp_path / "run", make(tmp_path / "other", 8, config_of(rows)), list[str]()
    assert begun_train(config_of(), run, "r") is None
    assert begin(run, rows, f"resume_from_checkpoint={path}") == path
    assert begin(run, rows, said=said) == path
    assert f"this run began from {path}, and has saved nothing since" in said
    stored = begun_train(config_of(), run, "r")
    assert stored is not None
    assert stored.global_batch_size == 24, "rows per step are kept, too"
    newer = make(run, 10, config_of(rows))
    assert begin(run, rows) == newer
    shutil.rmtree(newer)
    shutil.rmtree(path)
    assert begin(run, rows, said=said) is None
    assert "gone or damaged, and has saved nothing: beginning anew" in said[-1]


def test_a_protocol_that_a_program_has_registered_is_known() -> None:
    with pytest.raises(ConfigError, match="registered-by-us:// is not known"):
        remote.check_protocol("registered-by-us://place", "checkpoint.mirror")
    fsspec.register_implementation("registered-by-us", LocalFileSystem)
    remote.check_protocol("registered-by-us://place", "checkpoint.mirror")

"""A place at a mirror that another run has filled: refused by what begins anew, and never
emptied.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import pytest

from llmtune.checkpoint.find import find_checkpoints
from llmtune.checkpoint.mirror import Mirror, find_remote, withdraw_copies
from llmtune.cli.main import main
from llmtune.config.stored import dump_redacted
from llmtune.errors import CheckpointError
from llmtune.storage import layout, remote
from llmtune.storage.lock import hold_lock
from llmtune.train.mirror_owner import resolve_run_id
from llmtune.train.resume import resume_point
from llmtune.train.run_folder import RunFolder
from tests.support import TINY, run_cli
from tests.train.test_resume import config_of, damage, make


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.0)


def start(run: Path, mirror: Path, *overrides: str, said: list[str] | None = None) -> str:
    """What a start does before its ranks: the id that the run then has."""
    run.mkdir(parents=True, exist_ok=True)
    config, folder = config_of(f"checkpoint.mirror={mirror}", *overrides), RunFolder(run)
    say = print if said is None else said.append
    run_id = resolve_run_id(folder, config, "r", resume_point(folder, config, "r", say), say)
    (run / layout.PLAN).write_text(json.dumps({"run_id": run_id}))
    return run_id


def copy(run: Path, mirror: Path, run_id: str, step: int, keep: set[int]) -> list[tuple[str, str]]:
    copies = Mirror(str(mirror), "r", print, run_id)
    copies.put(make(run, step, config_of()), {f"checkpoint-{step}" for step in keep})
    return copies.finish(30)


def there(mirror: Path) -> list[str]:
    return [folder.name for folder in find_checkpoints(mirror / "r")]


def test_what_begins_anew_is_refused_a_place_that_is_used(tmp_path: Path) -> None:
    mirror, first = tmp_path / "mirror", tmp_path / "first"
    assert copy(first, mirror, start(first, mirror), 10, {10}) == []
    with pytest.raises(
        CheckpointError, match=r"another run has filled \(checkpoints: checkpoint-10\)"
    ):
        start(tmp_path / "second", mirror, "resume_from_checkpoint=none")
    path = make(tmp_path / "other", 20, config_of())
    with pytest.raises(CheckpointError, match="another run has filled"):
        start(tmp_path / "third", mirror, f"resume_from_checkpoint={path}")
    started = tmp_path / "fourth"
    make(started, 5, config_of())
    (started / layout.PLAN).write_text(json.dumps({"run_id": "another"}))
    (started / "config.yaml").write_text((started / "checkpoint-5" / "config.yaml").read_text())
    with pytest.raises(CheckpointError, match=r"checkpoints: checkpoint-10\)"):
        start(started, mirror)
    assert not (started / "checkpoint-10").exists(), "another run's is not fetched"
    shutil.rmtree(mirror / "r" / "checkpoint-10")
    with pytest.raises(CheckpointError, match="none are left"):
        start(started, mirror)
    assert start(first, mirror) == start(first, mirror), "its own run goes on"


def test_a_copy_cut_off_counts_as_used(tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    (mirror / "r" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="checkpoint-3"):
        start(tmp_path / "run", mirror, "resume_from_checkpoint=none")


def test_an_unused_place_is_taken_by_whatever_begins(tmp_path: Path) -> None:
    for name, overrides in {"a": (), "b": ("resume_from_checkpoint=none",)}.items():
        mirror, run = tmp_path / f"mirror-{name}", tmp_path / name
        run_id = start(run, mirror, *overrides)
        assert copy(run, mirror, run_id, 5, {5}) == []
        assert copy(run, mirror, run_id, 10, {10}) == []
        assert there(mirror) == ["checkpoint-10"], "its own older copy goes"
        assert start(run, mirror) == run_id


def test_a_lost_folder_goes_on_at_its_own_place(tmp_path: Path) -> None:
    mirror, run = tmp_path / "mirror", tmp_path / "run"
    run_id = start(run, mirror)
    assert copy(run, mirror, run_id, 10, {10}) == []
    # A second copy is cut off, and the machine is gone.
    shutil.copytree(mirror / "r" / "checkpoint-10", mirror / "r" / "checkpoint-20")
    (mirror / "r" / "checkpoint-20" / "COMPLETE").unlink()
    shutil.rmtree(run)
    assert start(run, mirror) == run_id
    assert copy(run, mirror, run_id, 20, {20}) == []
    assert there(mirror) == ["checkpoint-20"]


def test_copies_that_the_run_did_not_write_are_not_removed_though_nobody_looked(
    tmp_path: Path,
) -> None:
    """The mirror was out of reach at the start, and is there when the first copy comes."""
    mirror, first = tmp_path / "mirror", tmp_path / "first"
    assert copy(first, mirror, start(first, mirror), 10, {10}) == []
    before = (mirror / "r" / "checkpoint-10" / "manifest.json").read_bytes()
    for step in (10, 30):
        failed = copy(tmp_path / "second", mirror, "another", step, {step})
        assert failed == [
            (
                f"checkpoint-{step}",
                "the place belongs to another run; take another run_name= or checkpoint.mirror=",
            )
        ]
    assert there(mirror) == ["checkpoint-10"]
    assert (mirror / "r" / "checkpoint-10" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("name", ["exp*", "exp?", "exp[0-9]", "a b#c%20", "exp[lr=1e-4]"])
def test_a_name_that_reads_like_a_pattern_removes_its_own_copies_only(
    name: str, tmp_path: Path
) -> None:
    """At an object store; ``memory://`` is one, in this process."""
    system = fsspec.filesystem("memory")
    url = f"memory://{tmp_path.name}"
    for number, run_name in enumerate(("exp1", "expl", name)):
        copies = Mirror(url, run_name, print, run_name)
        # Removes its own copies of the steps of which the others have theirs.
        for step in (4, 8, 12) if run_name == name else (8,):
            copies.put(make(tmp_path / f"run-{number}", step, config_of()), {f"checkpoint-{step}"})
            assert copies.finish(30) == []
    found = {
        path.removeprefix(f"/{tmp_path.name}/").rpartition("/")[0]
        for path in system.find(f"/{tmp_path.name}")
    }
    assert found == {"", "exp1/checkpoint-8", "expl/checkpoint-8", f"{name}/checkpoint-12"}
    assert withdraw_copies(url, name, name, 8) == ["checkpoint-12"]
    assert [find_remote(url, run_name) != [] for run_name in ("exp1", "expl", name)] == [
        True,
        True,
        False,
    ]


def test_a_mirror_out_of_reach_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object) -> None:
        raise CheckpointError("no network")

    monkeypatch.setattr("llmtune.train.mirror_owner.read_place", unreachable)
    said: list[str] = []
    assert start(tmp_path / "run", tmp_path / "mirror", "resume_from_checkpoint=none", said=said)
    assert "warning: no network" in said


@pytest.mark.process
def test_none_with_a_used_mirror_ends_with_exit_5_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    job = [
        *TINY,
        "train.max_steps=1",
        "export=none",
        "launch.nproc=1",
        "run_name=r",
        f"checkpoint.mirror={tmp_path}/m",
    ]
    first = run_cli(*job, f"output_dir={tmp_path}/first")
    assert (first.code, there(tmp_path / "m")) == (0, ["checkpoint-1"]), first.err
    assert (tmp_path / "m" / "r.owner").read_text() == RunFolder(
        tmp_path / "first"
    ).read_record().run_id, "it has marked its place"
    files = {path: path.read_bytes() for path in (tmp_path / "m").rglob("*") if path.is_file()}
    done = run_cli(*job, f"output_dir={tmp_path}/second", "resume_from_checkpoint=none")
    assert (done.code, "has a folder for run_name=r that another run has filled" in done.err) == (
        5,
        True,
    ), done.err
    assert {
        path: path.read_bytes() for path in (tmp_path / "m").rglob("*") if path.is_file()
    } == files


def test_what_a_stop_left_no_time_for_is_copied_by_verify(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mirror, run = tmp_path / "mirror", tmp_path / "run"
    run_id = start(run, mirror)
    assert copy(run, mirror, run_id, 5, {5}) == []
    for step in (10, 15):
        make(run, step, config_of())
    damage(run / "checkpoint-15")
    (run / layout.PLAN).write_text(json.dumps({"run_id": run_id, "run_name": "r"}))
    (run / layout.CONFIG).write_text(dump_redacted(config_of(f"checkpoint.mirror={mirror}")))
    assert main(["verify", f"run={run}", "--mirror"]) == 5
    assert (
        "ok  " + str(mirror / "r") + " has every checkpoint that is whole" in capfd.readouterr().out
    )
    assert there(mirror) == ["checkpoint-5", "checkpoint-10"]
    shutil.rmtree(run / "checkpoint-15")
    assert main(["verify", f"run={run}", "--mirror", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["not_copied"] == {}


def test_verify_does_not_copy_beside_a_run_that_does(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mirror, run = tmp_path / "mirror", tmp_path / "run"
    start(run, mirror)
    make(run, 10, config_of())
    (run / layout.PLAN).write_text(json.dumps({"run_id": "a", "run_name": "r"}))
    (run / layout.CONFIG).write_text(dump_redacted(config_of(f"checkpoint.mirror={mirror}")))
    with hold_lock(run / layout.LOCK):
        assert main(["verify", f"run={run}"]) == 0
        assert main(["verify", f"run={run}", "--mirror"]) == 5
        assert "another run is using this folder" in capfd.readouterr().err
    assert there(mirror) == []
    assert main(["verify", f"run={run}", "--mirror"]) == 0
    assert there(mirror) == ["checkpoint-10"]


def test_verify_says_what_it_could_not_copy(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mirror, run = tmp_path / "mirror", tmp_path / "run"
    assert copy(tmp_path / "first", mirror, start(tmp_path / "first", mirror), 5, {5}) == []
    make(run, 10, config_of())
    (run / layout.PLAN).write_text(json.dumps({"run_id": "another", "run_name": "r"}))
    for stored, given, code, part in (
        (None, None, 2, "it has none"),
        ("s3://me:hunter2@b/x", None, 2, "a run folder holds no passwords"),
        (
            str(mirror),
            None,
            5,
            "checkpoint-10 is not at checkpoint.mirror: the place belongs to another run",
        ),
        (
            None,
            str(mirror),
            5,
            "checkpoint-10 is not at checkpoint.mirror: the place belongs to another run",
        ),
    ):
        (run / layout.CONFIG).write_text(
            dump_redacted(config_of(f"checkpoint.mirror={stored or 'null'}"))
        )
        extra = [f"checkpoint.mirror={given}"] if given else []
        assert main(["verify", f"run={run}", "--mirror", *extra]) == code
        assert part in capfd.readouterr().err
    assert there(mirror) == ["checkpoint-5"]
    assert main(["verify", f"checkpoint={run}/checkpoint-10", "--mirror"]) == 2


@pytest.mark.process
def test_the_next_start_copies_what_is_not_there_first(tmp_path: Path) -> None:
    job = [
        *TINY,
        "export=none",
        "launch.nproc=1",
        "run_name=r",
        "train.save_steps=1",
        f"output_dir={tmp_path}/run",
    ]
    assert run_cli(*job, "train.max_steps=2", "train.eval_max_rows=2").code == 0
    done = run_cli(
        *job, "train.max_steps=3", "train.eval_max_rows=2", f"checkpoint.mirror={tmp_path}/m"
    )
    assert done.code == 0, done.err
    assert there(tmp_path / "m") == ["checkpoint-2", "checkpoint-3"]

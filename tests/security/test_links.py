"""Links in the folders of others lead nowhere else: nothing outside is read, published or written
over.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmtune.cli.main import main
from llmtune.config.compose import compose_config
from llmtune.config.groups.export import ExportConfig
from llmtune.config.stored import dump_yaml, load_config
from llmtune.errors import CheckpointError, ConfigError, ExportError, MissingPrerequisiteError
from llmtune.export.prerequisites import check_exportable
from llmtune.model import source
from llmtune.security.trust import copy_foreign, find_objection, open_foreign
from llmtune.storage import layout
from llmtune.storage.hashing import hash_file
from llmtune.storage.lock import hold_lock
from llmtune.storage.manifest import mark_complete, write_manifest
from llmtune.train.run_folder import open_run_folder
from tests.export.conftest import make_adapter, make_base
from tests.support import TINY

SECRET = "planted-secret-of-the-victim"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file that is nobody else's business."""
    folder = tmp_path / "home"
    folder.mkdir()
    file = folder / ".env"
    file.write_text(f'{{"HF_TOKEN": "{SECRET}"}}')
    return file


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """A small base."""
    return make_base("llama", tmp_path / "base", tiny_model)


def export(*arguments: str) -> int:
    """The command, with what a test of links needs no time for left out."""
    return main(["export", *arguments])


#: Name of the planted link, and where in base or adapter it lies.
PLANTED = [
    "notes.txt",
    "more.json",
    "chat_template.jinja",
    "tokenizer.model",
    "planted.py",
    "LICENSE.x",
    "NOTICE",
    "USE_POLICY.md",
]


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("where", ["base", "adapter"])
def test_a_link_that_leads_out_is_not_exported(
    where: str,
    name: str,
    base: Path,
    tmp_path: Path,
    victim: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if where == "adapter" and name == "USE_POLICY.md":
        pytest.skip("one of the licenses is enough for the adapter")
    adapter = make_adapter(base, tmp_path / "adapter")
    folder = {"base": base, "adapter": adapter}[where]
    (folder / name).unlink(missing_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(victim)
    output = tmp_path / "out"
    code = export(f"base={base}", f"adapter={adapter}", f"output_dir={output}")
    said = capsys.readouterr().err
    assert code == ExportError.exit_code, said
    assert f"{folder / name} is a link that leads out of its folder, to {victim}" in said
    assert SECRET not in said
    assert not output.exists()
    assert not list(tmp_path.glob("out*")), "nothing is left"


@pytest.mark.parametrize(
    "form",
    ["absolute", "relative", "over another link", "through a folder", "/proc", "weights", "index"],
)
def test_every_form_of_link_is_seen(
    form: str, base: Path, tmp_path: Path, victim: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = base / "notes.txt"
    if form == "absolute":
        planted.symlink_to(victim)
    elif form == "relative":
        planted.symlink_to("../home/.env")
    elif form == "over another link":
        (base / "between").symlink_to(victim)
        planted.symlink_to("between")
    elif form == "through a folder":
        (base / "sub").symlink_to(victim.parent)
        planted.symlink_to("sub/.env")
    elif form == "/proc":
        planted.symlink_to("/proc/self/environ")
    elif form == "weights":
        planted = base / "model.safetensors"
        planted.rename(victim.parent / "private.safetensors")
        planted.symlink_to(victim.parent / "private.safetensors")
    else:
        planted = base / "model.safetensors.index.json"
        planted.symlink_to(victim)
    adapter = make_adapter(base, tmp_path / "adapter") if form == "absolute" else None
    if adapter is None:
        with pytest.raises(MissingPrerequisiteError, match="leads out of its folder"):
            # Before a training, of which the export would fail days later.
            check_exportable(ExportConfig(format="safetensors"), base)
        check_exportable(ExportConfig(format="none"), base)
        return
    assert (
        export(f"base={base}", f"adapter={adapter}", f"output_dir={tmp_path / 'out'}")
        == ExportError.exit_code
    )
    assert "leads out of its folder" in capsys.readouterr().err


def to_snapshot(folder: Path, cache: Path) -> Path:
    """The folder as the hub's client lays it out: links in a snapshot, files among the blobs."""
    model = cache / "models--me--base"
    snapshot = model / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, model / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_a_snapshot_of_the_hub_is_exported_as_ever(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (base / "LICENSE").write_text("MIT License\n")
    adapter = make_adapter(base, tmp_path / "adapter")
    snapshot = to_snapshot(base, tmp_path / "hub")
    # Caches are often kept on another disk behind a link.
    (tmp_path / "linked-hub").symlink_to(tmp_path / "hub")
    through = tmp_path / "linked-hub" / snapshot.relative_to(tmp_path / "hub")
    for number, place in enumerate((base, snapshot, through)):
        output = tmp_path / f"out-{number}"
        code = export(f"base={place}", f"adapter={adapter}", f"output_dir={output}")
        assert code == 0, capsys.readouterr().err
        assert not any(file.is_symlink() for file in output.rglob("*"))
        assert (output / "LICENSE").read_text() == "MIT License\n"
    first, second = (
        load_file(tmp_path / f"out-{number}" / "model.safetensors") for number in (0, 2)
    )
    assert all(bool((first[name] == second[name]).all()) for name in first)
    check_exportable(ExportConfig(format="safetensors"), snapshot)


@pytest.mark.parametrize(
    "form",
    [
        "a blob that is a link",
        "blobs that are a link",
        "the blobs of another model",
        "no hub cache",
    ],
)
def test_what_only_looks_like_a_snapshot_is_refused(
    form: str, base: Path, tmp_path: Path, victim: Path
) -> None:
    snapshot = to_snapshot(base, tmp_path / "hub")
    blobs = snapshot.parent.parent / "blobs"
    file = snapshot / "notes.txt"
    if form == "a blob that is a link":
        (blobs / "ff").symlink_to(victim)
        file.symlink_to("../../blobs/ff")
    elif form == "blobs that are a link":
        shutil.rmtree(blobs)
        blobs.symlink_to(victim.parent)
        file.symlink_to("../../blobs/.env")
    elif form == "the blobs of another model":
        other = tmp_path / "hub" / "models--me--private" / "blobs"
        other.mkdir(parents=True)
        shutil.copyfile(victim, other / "ff")
        file.symlink_to(other / "ff")
    else:
        (tmp_path / "snapshots" / "x").mkdir(parents=True)
        (tmp_path / "blobs").mkdir()
        shutil.copyfile(victim, tmp_path / "blobs" / "ff")
        file = tmp_path / "snapshots" / "x" / "notes.txt"
        file.symlink_to("../../blobs/ff")
    assert "leads out of its folder" in (find_objection(file) or "")


def test_other_things_than_regular_files_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "large.json").write_bytes(b"x" * 11)
    (tmp_path / "inside.json").symlink_to("large.json")
    said = {
        name: find_objection(tmp_path / f"{name}.json", 10)
        for name in ("pipe", "folder", "loop", "large", "gone")
    }
    assert said["pipe"] == said["folder"] == "is no regular file"
    assert said["large"] == "has 11 bytes, more than the 10 that such a file may have"
    assert "cannot be opened" in (said["loop"] or "")
    assert "cannot be opened" in (said["gone"] or "")
    for name in ("pipe", "folder", "loop", "large", "gone"):
        with pytest.raises(ExportError, match=f"{name}.json"):
            open_foreign(tmp_path / f"{name}.json", ExportError, 10)
    copy_foreign(tmp_path / "inside.json", tmp_path / "copy", ExportError, 11)
    assert (tmp_path / "copy").read_bytes() == b"x" * 11


def test_a_model_folder_behind_a_link_is_what_the_user_named(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    for name, folder in (("b", base), ("a", adapter)):
        (tmp_path / name).symlink_to(folder)
    assert (
        export(
            f"base={tmp_path / 'b'}", f"adapter={tmp_path / 'a'}", f"output_dir={tmp_path / 'out'}"
        )
        == 0
    )


def test_a_run_whose_result_is_a_link_is_not_taken_for_its_own(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private = tmp_path / "private"
    shutil.copytree(tiny_model, private)
    config = dump_yaml(compose_config([*TINY, "tuner=full", "precision=fp32"]).config)
    (private / layout.CONFIG).write_text(config)
    write_manifest(private, {file.name: hash_file(file) for file in private.iterdir()}, {"step": 1})
    mark_complete(private)
    run = tmp_path / "run"
    run.mkdir()
    (run / layout.CONFIG).write_text(config)
    (run / layout.MODEL).symlink_to(private)
    assert export(f"run={run}", f"output_dir={tmp_path / 'out'}") == CheckpointError.exit_code
    assert f"is a link that leads out of the run, to {private}" in capsys.readouterr().err
    assert export(f"checkpoint={private}", f"output_dir={tmp_path / 'out'}") == 0, (
        "it is the user who names it now"
    )


def test_a_stored_configuration_that_is_a_link_is_not_read(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / layout.CONFIG).symlink_to(victim)
    with pytest.raises(ConfigError, match="leads out of its folder") as caught:
        load_config(tmp_path / "run" / layout.CONFIG)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", [layout.PLAN, layout.METRICS, layout.LOCK, layout.LOG, "anything"])
@pytest.mark.parametrize("there", [True, False])
def test_a_run_does_not_write_through_links_in_its_folder(
    name: str, there: bool, tmp_path: Path, victim: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    target = victim if there else victim.with_name("new")
    (run / name).symlink_to(target)
    with pytest.raises(CheckpointError, match=f"{name} is a link that leads out of the run folder"):
        open_run_folder(run, lambda _: None)
    assert SECRET in victim.read_text()
    assert not victim.with_name("new").exists()


def test_links_within_a_run_folder_and_checkpoints_on_another_disk_stay(tmp_path: Path) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk" / "checkpoint-5"
    (run / "wandb" / "run-1").mkdir(parents=True)
    disk.mkdir(parents=True)
    (run / "wandb" / "latest-run").symlink_to("run-1")
    (run / "metrics.old").symlink_to("metrics.jsonl")
    (run / "checkpoint-5").symlink_to(disk)
    (tmp_path / "named").symlink_to(run)
    assert open_run_folder(tmp_path / "named", lambda _: None).path == tmp_path / "named"


@pytest.mark.parametrize("what", ["link", "dangling link", "pipe", "folder"])
def test_a_lock_is_not_taken_through_what_lies_in_its_place(
    what: str, tmp_path: Path, victim: Path
) -> None:
    lock = tmp_path / ".lock"
    if what == "link":
        lock.symlink_to(victim)
    elif what == "dangling link":
        lock.symlink_to(victim.with_name("new"))
    elif what == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    with (
        pytest.raises(MissingPrerequisiteError, match="something else than a lock file"),
        hold_lock(lock),
    ):
        pass
    assert SECRET in victim.read_text(), "emptied"
    assert not victim.with_name("new").exists()


def test_a_link_in_the_place_of_amake_once_models_lock_empties_nothing(
    tmp_path: Path, victim: Path
) -> None:
    folder = tmp_path / "models" / "x"
    folder.parent.mkdir()

    def make(aside: Path) -> None:
        aside.mkdir()
        (aside / "model.safetensors").touch()

    folder.with_suffix(".lock").symlink_to(victim)
    with pytest.raises(MissingPrerequisiteError, match="something else than a lock file"):
        source.make_once(folder, make)
    assert SECRET in victim.read_text()
    folder.with_suffix(".lock").unlink()
    assert source.make_once(folder, make) == folder
    assert source.make_once(folder, make) == folder

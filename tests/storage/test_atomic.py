"""Files and folders are there whole: killed between any two steps, the old or the new one is there,
and what is left over stands in nobody's way.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmtune.storage import atomic
from llmtune.storage.atomic import (
    REPLACED,
    append_line,
    aside_path,
    link_or_copy,
    make_empty,
    move_folder,
    read_json,
    remove_folder,
    remove_parts,
    replace_folder,
    replaced_path,
    restore_replaced,
    write_atomically,
    write_cache_file,
    write_cache_folder,
)


class Killed(BaseException):
    """In the place of SIGKILL: no handler of the code may look at it."""


@contextmanager
def killed_at(call: int) -> Iterator[list[str]]:
    """End at the so manieth call of the kernel that changes or flushes a name; all up to there."""
    calls: list[str] = []

    def counted(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object, **named: object) -> object:
            if len(calls) == call:
                raise Killed
            calls.append(name)
            return real(*arguments, **named)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", counted("fsync", os.fsync))
        for name in ("replace", "rename"):
            patch.setattr(Path, name, counted(name, getattr(Path, name)))
        patch.setattr(shutil, "rmtree", counted("rmtree", shutil.rmtree))
        try:
            yield calls
        except Killed:
            calls.append("killed")


def every_kill(act: Callable[[], None], prepare: Callable[[], None]) -> Iterator[list[str]]:
    """Run ``act`` once for each of its steps, killed before that step; last, to its end."""
    for call in range(100):
        prepare()
        with killed_at(call) as calls:
            act()
        yield calls
        if calls[-1] != "killed":
            return
    raise AssertionError("it never ends")


def is_complete(folder: Path) -> bool:
    return (folder / "mark").is_file()


def make(folder: Path, text: str, mark: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data").write_text(text)
    if mark:
        (folder / "mark").touch()
    return folder


def test_a_file_killed_at_any_step_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    seen, steps = [], []
    for calls in every_kill(lambda: write_atomically(file, "new"), lambda: write_old(file)):
        steps = calls
        seen.append(file.read_text())
        # Whatever was left is written over by the next try, which leaves nothing else.
        write_atomically(file, "next")
        assert file.read_text() == "next"
        assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert steps == ["fsync", "replace", "fsync"], "the file, its name, the folder of the name"
    assert seen == ["old", "old", "new", "new"]


def write_old(file: Path) -> None:
    file.write_text("old")


def test_whoever_sees_a_file_may_rename_its_folder_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 publishes a checkpoint as soon as the last rank's report is there."""
    folder = make(tmp_path / "checkpoint-5.tmp", "x")
    real = os.replace

    def replace_and_publish(source: Path, target: Path) -> None:
        real(source, target)
        folder.rename(tmp_path / "checkpoint-5")

    monkeypatch.setattr(os, "replace", replace_and_publish)
    write_atomically(folder / "written-00001.json", "{}")
    assert (tmp_path / "checkpoint-5" / "written-00001.json").read_text() == "{}"


@pytest.mark.parametrize("seals", [True, False])
def test_a_folder_killed_at_any_step_is_the_old_or_the_new_one(tmp_path: Path, seals: bool) -> None:
    folder = tmp_path / "checkpoint-5"
    aside = aside_path(folder)

    def prepare() -> None:
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        make(folder, "old")
        make(aside, "new", mark=not seals)

    def seal(place: Path) -> None:
        (place / "mark").touch()

    def replace() -> None:
        replace_folder(aside, folder, is_complete, seal if seals else None)

    seen, steps = [], []
    for calls in every_kill(replace, prepare):
        steps = calls
        restore_replaced(folder, is_complete)
        assert is_complete(folder), calls
        seen.append((folder / "data").read_text())
        # Once more over whatever was left.
        remove_folder(aside)
        make(aside, "next", mark=not seals)
        replace()
        assert (folder / "data").read_text() == "next"
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    # Flush the new one, move the old one away, rename, flush the names, remove the old one.
    assert [step for step in steps if step != "rmtree"] == ["fsync", "rename", "rename", "fsync"]
    assert seen == sorted(seen, reverse=True), "old until new"
    assert {"old", "new"} == set(seen)


def test_a_first_folder_needs_no_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    replace_folder(make(aside_path(folder), "first"), folder, is_complete)
    assert (folder / "data").read_text() == "first"
    empty = tmp_path / "empty"
    empty.mkdir()
    replace_folder(make(aside_path(empty), "first"), empty, is_complete)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]


def test_a_whole_old_folder_is_not_thrown_away_for_half_a_new_one(tmp_path: Path) -> None:
    """Killed before the mark, and nobody restored it before the next try."""
    folder = make(tmp_path / "checkpoint-5", "half", mark=False)
    make(replaced_path(folder), "old")
    aside = make(aside_path(folder), "newer", mark=False)
    with killed_at(3) as calls:
        replace_folder(aside, folder, is_complete)
    assert calls[-1] == "killed"
    restore_replaced(folder, is_complete)
    assert (folder / "data").read_text() == "old"


def test_only_a_whole_old_folder_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    old = make(replaced_path(folder), "old", mark=False)
    assert old.name == f"out{REPLACED}"
    restore_replaced(folder, is_complete)
    assert not folder.exists()
    (old / "mark").touch()
    make(folder, "new")
    restore_replaced(folder, is_complete)
    assert (folder / "data").read_text() == "new"
    assert old.is_dir(), "whoever sweeps says so"


@pytest.mark.parametrize("place", ["name", "old", "both"])
def test_links_to_folders_elsewhere_are_replaced_and_not_followed(
    tmp_path: Path, place: str
) -> None:
    """A checkpoint that was moved to another disk, with a link in its place."""
    folder, other = tmp_path / "checkpoint-5", make(tmp_path / "disk", "old")
    if place in ("name", "both"):
        folder.symlink_to(other)
    if place in ("old", "both"):
        replaced_path(folder).symlink_to(other)
    replace_folder(make(aside_path(folder), "new"), folder, is_complete)
    assert (folder / "data").read_text() == "new"
    assert (other / "data").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "disk"]


def test_a_folder_takes_a_name_that_is_taken(tmp_path: Path) -> None:
    make(tmp_path / "superseded", "older")
    move_folder(make(tmp_path / "checkpoint-5", "old"), tmp_path / "superseded")
    assert (tmp_path / "superseded" / "data").read_text() == "old"
    assert not (tmp_path / "checkpoint-5").exists()


def test_an_empty_folder_is_made_of_what_was_left(tmp_path: Path) -> None:
    folder = make(tmp_path / "deep" / "x.tmp", "half")
    make_empty(folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("linked", [True, False])
def test_a_second_name_holds_the_same_bytes(
    tmp_path: Path, linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"weights")
    # It is another name of the victim, which must not be written into.
    victim = tmp_path / "victim"
    victim.write_bytes(b"victim")
    os.link(victim, target)
    flushed: list[Path] = []
    monkeypatch.setattr(atomic, "flush", flushed.append)
    if not linked:

        def refuse(*_: object) -> None:
            raise OSError(1, "no hard links on this file system")

        monkeypatch.setattr(os, "link", refuse)
    assert link_or_copy(source, target) is linked
    assert target.read_bytes() == b"weights"
    assert victim.read_bytes() == b"victim"
    assert source.samefile(target) is linked
    assert flushed == ([] if linked else [target])


def test_a_link_is_of_the_file_and_not_of_a_link_to_it(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "snapshot").symlink_to("blob")
    assert link_or_copy(tmp_path / "snapshot", tmp_path / "b")
    assert not (tmp_path / "b").is_symlink()


def test_several_processes_write_one_file_of_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hashes" / "key"
    write_cache_file(file, "mine")
    real = os.replace

    def be_second(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", real)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        write_cache_file(file, "another's")
        real(source, target)

    monkeypatch.setattr(os, "replace", be_second)
    write_cache_file(file, "mine again")
    assert file.read_text() == "mine again"
    assert [path.name for path in file.parent.iterdir()] == ["key"]


def test_a_cache_file_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        write_cache_file(tmp_path / "key", "x")
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_cache_folders_stays(tmp_path: Path) -> None:
    folder = tmp_path / "tokens" / "key"
    with write_cache_folder(folder) as aside:
        make(aside, "second")
        make(folder, "first")
    assert (folder / "data").read_text() == "first"
    assert [path.name for path in folder.parent.iterdir()] == ["key"]


def test_a_cache_folder_that_fails_is_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "tokens" / "key"

    def write() -> None:
        with write_cache_folder(folder) as aside:
            make(aside, "half")
            raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"):
        write()
    assert list(folder.parent.iterdir()) == []


def test_a_cache_folder_that_gets_no_name_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "key"

    def write() -> None:
        with write_cache_folder(folder) as aside:
            make(aside, "whole")
            folder.write_text("a file in its place")

    with pytest.raises(OSError, match="key"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_parts_of_files_are_removed_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "sub", "x")
    with killed_at(0):
        write_atomically(tmp_path / "sub" / "manifest.json", "{}")
    with killed_at(0):
        write_cache_file(tmp_path / "key", "x")
    (tmp_path / "model.part").touch()
    remove_parts(tmp_path)
    names = {path.name for path in tmp_path.rglob("*")}
    assert names == {"sub", "data", "mark", "model.part"}


def test_lines_are_appended_and_on_the_disk(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    append_line(file, "ä")
    with killed_at(0):
        append_line(file, "b")
    assert file.read_text(encoding="utf-8") == "ä\nb\n", "written, and not yet flushed"


@pytest.mark.parametrize(
    ("data", "value"), [(b'{"a": 1}', {"a": 1}), (b"", None), (b'{"a"', None), (b"\xff", None)]
)
def test_json_that_was_cut_off_is_none(tmp_path: Path, data: bytes, value: object) -> None:
    assert read_json(tmp_path / "x") is None
    (tmp_path / "x").write_bytes(data)
    assert read_json(tmp_path / "x") == value


@pytest.mark.parametrize("last", ["write", "flush", "replace"])
def test_a_file_that_cannot_be_written_stays_what_it_was(
    last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "plan.json"
    write_atomically(file, "old")

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if last == "write":
            patch.setattr(Path, "open", refuse)
        else:
            patch.setattr(os, {"flush": "fsync", "replace": "replace"}[last], refuse)
        with pytest.raises(OSError, match="No space"):
            write_atomically(file, "new")
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_file_that_is_no_json_is_none(tmp_path: Path) -> None:
    assert read_json(tmp_path / "missing") is None
    for data, found in ((b"", None), (b"\xff", None), (b"{", None), (b"[1]", [1]), (b"0", 0)):
        (tmp_path / "file").write_bytes(data)
        assert read_json(tmp_path / "file") == found

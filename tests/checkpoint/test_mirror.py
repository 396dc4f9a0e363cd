"""Copies of checkpoints elsewhere: whole or not there, retried, verified, pruned, and fetched back
safely.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import xxhash
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from llmtune.checkpoint.find import find_checkpoints
from llmtune.checkpoint.mirror import Mirror, fetch_remote, find_remote
from llmtune.errors import CheckpointError, ConfigError
from llmtune.storage import layout, remote
from llmtune.storage.hashing import hash_file
from llmtune.storage.manifest import check_undamaged, mark_complete, write_manifest
from tests.support import ROOT

TIMEOUT = 30


class FaultyFile(MemoryFile):  # type: ignore[misc]
    """Tells its file system when it is written; later it is opened to be read, and closed again."""

    written = False

    def close(self) -> None:
        if not self.written:
            self.written = True
            FaultyFileSystem.on_written(self)


class FaultyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """A network that fails the first writes, flips a bit of some, or stands still; and remembers
    what it was asked.
    """

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    fail_writes = 0
    corrupt_writes = 0
    fail_removals = 0
    gate = threading.Event()
    written: ClassVar[list[str]] = []
    removed: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(
            MemoryFileSystem._strip_protocol(str(path).removeprefix("faulty://").rpartition("@")[2])
        )

    @classmethod
    def on_written(cls, file: MemoryFile) -> None:
        if cls.corrupt_writes and file.getbuffer().nbytes:
            cls.corrupt_writes -= 1
            file.getbuffer()[0] ^= 1

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        cls = type(self)
        if "w" not in mode:
            return super()._open(path, mode, **kwargs)
        cls.gate.wait(TIMEOUT)
        if cls.fail_writes:
            cls.fail_writes -= 1
            raise ConnectionResetError(
                f"reset by peer while writing faulty://me:hunter2@host{path}"
            )
        cls.written.append(path)
        file = FaultyFile(self, path)
        self.store[path] = file
        return file

    def rm_file(self, path: str) -> None:
        cls = type(self)
        if cls.fail_removals:
            cls.fail_removals -= 1
            raise ConnectionResetError("reset by peer")
        super().rm_file(path)
        cls.removed.append(path)


@pytest.fixture(autouse=True)
def stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FaultyFileSystem]]:
    """Empty memory file systems, and retries that do not wait."""
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)
    MemoryFileSystem.store.clear()
    FaultyFileSystem.store.clear()
    for name in ("fail_writes", "corrupt_writes", "fail_removals"):
        setattr(FaultyFileSystem, name, 0)
    FaultyFileSystem.written.clear()
    FaultyFileSystem.removed.clear()
    FaultyFileSystem.gate.set()
    yield FaultyFileSystem
    FaultyFileSystem.gate.set()


def write_checkpoint(run: Path, step: int, content: str = "") -> Path:
    """A complete checkpoint with a file in a folder of its own and an empty one."""
    folder = layout.checkpoint_folder(run, step)
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(f"weights of {step} {content}".encode() * 1000)
    (folder / "tokenizer" / "vocab.txt").write_text("a b c")
    (folder / "empty.txt").touch()
    files = {
        path.relative_to(folder).as_posix(): hash_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_manifest(folder, files, {"step": step})
    mark_complete(folder)
    return folder


def copy(
    url: str, folder: Path, keep: set[str] | None = None
) -> tuple[list[tuple[str, str]], list[str]]:
    """Copy one checkpoint and wait; what failed, and what was said."""
    said: list[str] = []
    copies = Mirror(url, "run", said.append)
    copies.put(folder, {folder.name} if keep is None else keep)
    return copies.finish(TIMEOUT), said


def names_at(url: str) -> list[str]:
    return [url.rpartition("/")[2] for _, url in find_remote(url, "run")]


@pytest.mark.parametrize("kind", ["memory", "file", "path"])
def test_a_copy_comes_back_byte_for_byte(kind: str, tmp_path: Path) -> None:
    url = {
        "memory": "memory://bucket/models",
        "file": f"file://{tmp_path}/disk",
        "path": f"{tmp_path}/disk/",
    }[kind]
    folder = write_checkpoint(tmp_path / "run", 10)
    assert copy(url, folder) == ([], [])

    ((step, remote),) = find_remote(url, "run")
    assert step == 10
    fetched = fetch_remote(remote, tmp_path / "other")
    assert fetched == tmp_path / "other" / "checkpoint-10"
    assert find_checkpoints(tmp_path / "other") == [fetched]
    check_undamaged(fetched)
    for path in folder.rglob("*"):
        if path.is_file():
            assert (fetched / path.relative_to(folder)).read_bytes() == path.read_bytes()
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["checkpoint-10"]


def test_the_marker_is_written_last_behind_the_manifest(
    tmp_path: Path, stores: type[FaultyFileSystem]
) -> None:
    copy("faulty://b", write_checkpoint(tmp_path, 10))
    written = [path.removeprefix("/b/run/checkpoint-10/") for path in stores.written]
    assert written[-2:] == ["manifest.json", "COMPLETE"]
    assert sorted(written[:-2]) == ["empty.txt", "model.safetensors", "tokenizer/vocab.txt"]


def test_a_network_that_fails_at_first_is_tried_again(
    tmp_path: Path, stores: type[FaultyFileSystem]
) -> None:
    stores.fail_writes = remote.ATTEMPTS - 1
    assert copy("faulty://b", write_checkpoint(tmp_path, 10)) == ([], [])
    assert names_at("faulty://b") == ["checkpoint-10"]


def test_a_network_that_stays_away_is_said_once_without_the_password(
    tmp_path: Path, stores: type[FaultyFileSystem]
) -> None:
    stores.fail_writes = 1000
    failed, said = copy("faulty://me:hunter2@b", write_checkpoint(tmp_path, 10))
    assert [name for name, _ in failed] == ["checkpoint-10"]
    assert len(said) == 1
    for text in (failed[0][1], said[0]):
        assert "reset by peer" in text
        assert "hunter2" not in text
    assert "faulty://***@b/run" in said[0]
    assert 1000 - stores.fail_writes == remote.ATTEMPTS
    assert not find_remote("faulty://me:hunter2@b", "run")


def test_waits_double(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stores: type[FaultyFileSystem]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 1.0)
    monkeypatch.setattr(time, "sleep", waits.append)
    stores.fail_writes = 1000
    copy("faulty://b", write_checkpoint(tmp_path, 10))
    assert waits == [1.0, 2.0, 4.0, 8.0]


def test_a_bit_that_flips_on_the_way_is_found_and_the_file_sent_again(
    tmp_path: Path, stores: type[FaultyFileSystem]
) -> None:
    stores.corrupt_writes = 2
    folder = write_checkpoint(tmp_path, 10)
    assert copy("faulty://b", folder) == ([], [])
    stored = stores.store["/b/run/checkpoint-10/model.safetensors"].getvalue()
    assert stored == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("spared", [0, 3, 4])
def test_bits_that_keep_flipping_leave_no_complete_copy(
    spared: int, tmp_path: Path, stores: type[FaultyFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 3 spares the listed files and hits the manifest, 4 the marker.
    def on_written(file: MemoryFile) -> None:
        if len(stores.written) > spared and file.getbuffer().nbytes:
            file.getbuffer()[0] ^= 1

    monkeypatch.setattr(stores, "on_written", staticmethod(on_written))
    failed, said = copy("faulty://b", write_checkpoint(tmp_path, 10))
    assert "reads back with other contents" in failed[0][1]
    assert len(said) == 1
    assert not find_remote("faulty://b", "run")


def test_the_same_copy_is_not_sent_twice(tmp_path: Path, stores: type[FaultyFileSystem]) -> None:
    folder = write_checkpoint(tmp_path, 10)
    copy("faulty://b", folder)
    stores.written.clear()
    assert copy("faulty://b", folder) == ([], [])
    assert stores.written == []


def test_a_half_made_copy_and_another_of_the_same_step_are_replaced(tmp_path: Path) -> None:
    copy("memory://b", write_checkpoint(tmp_path / "old", 10, "old"))
    copy("memory://b", write_checkpoint(tmp_path / "old", 20, "old"), {"checkpoint-10"})
    store = MemoryFileSystem.store
    store["/b/run/checkpoint-10/left-over.bin"] = store["/b/run/checkpoint-10/empty.txt"]
    del store["/b/run/checkpoint-10/COMPLETE"]
    assert names_at("memory://b") == ["checkpoint-20"]

    for step in (10, 20):
        folder = write_checkpoint(tmp_path / "new", step, "new")
        assert copy("memory://b", folder, {"checkpoint-10", "checkpoint-20"}) == ([], [])
        fetched = fetch_remote(f"memory://b/run/checkpoint-{step}", tmp_path / "fetched")
        assert (fetched / "model.safetensors").read_bytes() == (
            folder / "model.safetensors"
        ).read_bytes()
    assert "/b/run/checkpoint-10/left-over.bin" not in store


def test_what_is_not_kept_goes_once_the_new_one_is_there_marker_first(
    tmp_path: Path, stores: type[FaultyFileSystem]
) -> None:
    for step in (5, 10, 100):
        copy("faulty://b", write_checkpoint(tmp_path, step), {"checkpoint-5", "checkpoint-10"})
    copy("faulty://b", write_checkpoint(tmp_path, 110), {"checkpoint-10"})
    assert names_at("faulty://b") == ["checkpoint-10", "checkpoint-110"]
    for step in (5, 100):
        gone = [path for path in stores.removed if f"/checkpoint-{step}/" in path]
        assert gone[0].endswith("/COMPLETE")
        assert len(gone) == 5
    assert not any("/checkpoint-100/" in path or "/checkpoint-5/" in path for path in stores.store)


def test_other_runs_and_other_files_stay(tmp_path: Path) -> None:
    MemoryFileSystem.store["/b/run/notes.txt"] = MemoryFile(None, "/b/run/notes.txt", b"mine")
    other = Mirror("memory://b", "run-2", print)
    other.put(write_checkpoint(tmp_path / "2", 10), set())
    assert other.finish(TIMEOUT) == []
    copy("memory://b", write_checkpoint(tmp_path / "1", 20), set())
    assert "/b/run/notes.txt" in MemoryFileSystem.store
    assert [step for step, _ in find_remote("memory://b", "run-2")] == [10]


def test_nothing_is_removed_where_the_new_copy_failed(
    tmp_path: Path, stores: type[FaultyFileSystem]
) -> None:
    copy("faulty://b", write_checkpoint(tmp_path, 10))
    stores.fail_writes = 1000
    failed, _ = copy("faulty://b", write_checkpoint(tmp_path, 20), set())
    assert len(failed) == 1
    assert names_at("faulty://b") == ["checkpoint-10"]


def test_a_removal_that_fails_is_said_and_fails_no_copy(
    tmp_path: Path, stores: type[FaultyFileSystem]
) -> None:
    copy("faulty://b", write_checkpoint(tmp_path, 10))
    stores.fail_removals = 1000
    failed, said = copy("faulty://b", write_checkpoint(tmp_path, 20), set())
    assert failed == []
    assert len(said) == 1
    assert "not removed" in said[0]
    assert names_at("faulty://b") == ["checkpoint-10", "checkpoint-20"]


def test_put_returns_at_once_and_names_what_is_busy(
    tmp_path: Path, stores: type[FaultyFileSystem]
) -> None:
    stores.gate.clear()
    first, second = write_checkpoint(tmp_path, 10), write_checkpoint(tmp_path, 20)
    copies = Mirror("faulty://b", "run", print)
    started = time.monotonic()
    copies.put(first, {first.name})
    copies.put(second, {first.name, second.name})
    assert time.monotonic() - started < 5
    assert copies.busy == {first, second}
    assert copies.finish(0.05) == [
        ("checkpoint-10", "not copied within 0.05 s"),
        ("checkpoint-20", "not copied within 0.05 s"),
    ]
    stores.gate.set()
    assert copies.finish(TIMEOUT) == []
    assert copies.busy == set()
    assert names_at("faulty://b") == ["checkpoint-10", "checkpoint-20"]


def test_waiting_checkpoints_that_are_no_longer_kept_leave_the_queue(
    tmp_path: Path, stores: type[FaultyFileSystem]
) -> None:
    stores.gate.clear()
    first, second, third = (write_checkpoint(tmp_path, step) for step in (10, 20, 30))
    copies = Mirror("faulty://b", "run", print)
    copies.put(first, set())
    wait_until(lambda: copies._current is not None)
    copies.put(second, set())
    copies.put(third, set())
    assert copies.busy == {first, third}
    stores.gate.set()
    assert copies.finish(TIMEOUT) == []
    assert names_at("faulty://b") == ["checkpoint-30"]
    assert not any("checkpoint-20" in path for path in stores.written)


@pytest.mark.parametrize("vanished", ["folder", "one file"])
def test_a_checkpoint_pruned_before_it_was_copied_is_skipped(
    vanished: str, tmp_path: Path, stores: type[FaultyFileSystem]
) -> None:
    folder = write_checkpoint(tmp_path, 10)
    if vanished == "folder":
        shutil.rmtree(folder)
    else:
        (folder / "model.safetensors").unlink()
    failed, said = copy("faulty://b", folder)
    assert failed == [("checkpoint-10", "skipped, because it was pruned")]
    assert len(said) == 1
    assert not find_remote("faulty://b", "run")


def test_a_damaged_local_checkpoint_is_not_passed_on(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 10)
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"X")
    failed, _ = copy("memory://b", folder)
    assert "model.safetensors is damaged on the local disk" in failed[0][1]
    assert not find_remote("memory://b", "run")


def test_a_failure_is_forgotten_once_the_checkpoint_made_it(
    tmp_path: Path, stores: type[FaultyFileSystem]
) -> None:
    folder = write_checkpoint(tmp_path, 10)
    copies = Mirror("faulty://b", "run", lambda _: None)
    stores.fail_writes = remote.ATTEMPTS
    copies.put(folder, set())
    assert len(copies.finish(TIMEOUT)) == 1
    copies.put(folder, set())
    assert copies.finish(TIMEOUT) == []


@pytest.mark.process
def test_the_exit_does_not_wait_for_a_mirror_that_stands_still(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 10)
    program = f"""
import pathlib, threading, fsspec
from fsspec.implementations.memory import MemoryFileSystem
from llmtune.checkpoint.mirror import Mirror
reached = threading.Event()
class Still(MemoryFileSystem):
    def _open(self, path, mode="rb", **kwargs):
        reached.set()
        threading.Event().wait()
fsspec.register_implementation("still", Still)
mirror = Mirror("still://b", "run", print)
mirror.put(pathlib.Path({str(folder)!r}), set())
assert reached.wait(30)
print(mirror.finish(0.1))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "not copied within 0.1 s" in done.stdout


@pytest.mark.parametrize(
    ("url", "package"),
    [
        ("s3://b/x", "s3fs"),
        ("gs://b", "gcsfs"),
        ("az://b", "adlfs"),
        ("abfss://b@a.net/x", "adlfs"),
        ("oss://b", "ossfs"),
    ],
)
def test_a_missing_driver_is_named_with_its_command(
    url: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"checkpoint.mirror=.*pip install {package}"):
        Mirror(url, "run", print)


def test_an_unknown_protocol_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"s4://\*\*\*@b.*[Pp]rotocol"):
        Mirror("s4://me:hunter2@b", "run", print)


# -------------------------------------------------------------------------------------------------
# fetching


def remote_checkpoint(tmp_path: Path) -> str:
    copy("memory://b", write_checkpoint(tmp_path / "source", 10))
    return "memory://b/run/checkpoint-10"


def rewrite(manifest: dict[str, Any]) -> None:
    """An attacker's manifest with the marker that fits it."""
    text = json.dumps(manifest).encode()
    for name, data in (
        ("manifest.json", text),
        ("COMPLETE", xxhash.xxh3_128(text).hexdigest().encode()),
    ):
        fsspec.filesystem("memory").pipe_file(f"/b/run/checkpoint-10/{name}", data)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/tmp/x",
        "a/../../x",
        "",
        ".",
        "./x",
        "a//x",
        "x/",
        "x\0y",
        "COMPLETE",
        "manifest.json",
    ],
)
def test_a_manifest_that_names_a_file_elsewhere_is_refused_unopened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = remote_checkpoint(tmp_path)
    data = b"owned"
    rewrite({"files": {name: {"size": len(data), "xxh3_128": xxhash.xxh3_128(data).hexdigest()}}})
    opened: list[str] = []
    monkeypatch.setattr(
        MemoryFileSystem, "_open", lambda self, path, *rest, **more: opened.append(path)
    )
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match="is no file of a checkpoint"):
        fetch_remote(url, run)
    assert opened == []
    assert not run.exists()


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {}}}']
)
def test_a_manifest_that_is_none_is_an_error(text: str, tmp_path: Path) -> None:
    url = remote_checkpoint(tmp_path)
    fsspec.filesystem("memory").pipe_file("/b/run/checkpoint-10/manifest.json", text.encode())
    with pytest.raises(CheckpointError, match="not the one that COMPLETE was written for"):
        fetch_remote(url, tmp_path / "run")
    marker = xxhash.xxh3_128(text.encode()).hexdigest().encode()
    fsspec.filesystem("memory").pipe_file("/b/run/checkpoint-10/COMPLETE", marker)
    with pytest.raises(CheckpointError, match=r"manifest.json cannot be read"):
        fetch_remote(url, tmp_path / "run")


def test_only_files_of_the_manifest_are_fetched(tmp_path: Path) -> None:
    url = remote_checkpoint(tmp_path)
    fsspec.filesystem("memory").pipe_file("/b/run/checkpoint-10/evil.py", b"import os")
    folder = fetch_remote(url, tmp_path / "run")
    assert not (folder / "evil.py").exists()
    check_undamaged(folder)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_copy_is_not_published(damage: str, tmp_path: Path) -> None:
    url = remote_checkpoint(tmp_path)
    path = "/b/run/checkpoint-10/model.safetensors"
    data = bytearray(MemoryFileSystem.store[path].getvalue())
    data[7] ^= 1
    if damage == "missing":
        del MemoryFileSystem.store[path]
    else:
        fsspec.filesystem("memory").pipe_file(
            path, bytes(data[:100] if damage == "truncated" else data)
        )
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        fetch_remote(url, run)
    assert list(run.iterdir()) == []


def test_a_copy_without_its_marker_is_none(tmp_path: Path) -> None:
    url = remote_checkpoint(tmp_path)
    del MemoryFileSystem.store["/b/run/checkpoint-10/COMPLETE"]
    assert find_remote("memory://b", "run") == []
    with pytest.raises(CheckpointError, match="no complete checkpoint is there"):
        fetch_remote(url, tmp_path / "run")


def test_the_same_checkpoint_here_already_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = remote_checkpoint(tmp_path)
    monkeypatch.setattr(remote.RemoteFolder, "download", None)
    assert fetch_remote(url, tmp_path / "source") == tmp_path / "source" / "checkpoint-10"


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
def test_a_damaged_one_here_is_fetched_anew(file: str, tmp_path: Path) -> None:
    url = remote_checkpoint(tmp_path)
    mine = tmp_path / "source" / "checkpoint-10"
    with (mine / file).open("r+b") as opened:
        opened.write(b"X")
    assert fetch_remote(url, tmp_path / "source") == mine
    check_undamaged(mine)


def test_another_checkpoint_of_the_same_step_is_an_error_and_stays(tmp_path: Path) -> None:
    url = remote_checkpoint(tmp_path)
    mine = write_checkpoint(tmp_path / "run", 10, "mine")
    with pytest.raises(
        CheckpointError, match="is another checkpoint than memory://b/run/checkpoint-10"
    ):
        fetch_remote(url, tmp_path / "run")
    check_undamaged(mine)


def test_leftovers_of_a_fetch_and_an_incomplete_folder_are_replaced(tmp_path: Path) -> None:
    url = remote_checkpoint(tmp_path)
    half = write_checkpoint(tmp_path / "run", 10, "half")
    (half / "COMPLETE").unlink()
    aside = tmp_path / "run" / "checkpoint-10.fetch.tmp"
    aside.mkdir()
    (aside / "left-over.bin").touch()
    check_undamaged(fetch_remote(url, tmp_path / "run"))
    assert not aside.exists()


def test_a_url_of_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"://\*\*\*@b/run: .*checkpoint-<step>"):
        fetch_remote("s3://me:hunter2@b/run", tmp_path)


def test_a_mirror_that_cannot_be_read_is_an_error_without_the_password(
    tmp_path: Path, stores: type[FaultyFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, path: str, **kwargs: Any) -> bytes:
        raise PermissionError(f"faulty://me:hunter2@b{path}: no")

    monkeypatch.setattr(stores, "cat_file", fail)
    copy("faulty://b", write_checkpoint(tmp_path, 10))
    monkeypatch.setattr(stores, "ls", fail)
    for act in (
        lambda: find_remote("faulty://me:hunter2@b", "run"),
        lambda: fetch_remote("faulty://me:hunter2@b/run/checkpoint-10", tmp_path / "run"),
    ):
        with pytest.raises(CheckpointError, match="PermissionError") as caught:
            act()
        assert "hunter2" not in str(caught.value)
        assert "run the same command again" in str(caught.value)


def test_nothing_at_the_mirror_is_no_checkpoint() -> None:
    assert find_remote("memory://b", "run") == []


def wait_until(reached: Any) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)

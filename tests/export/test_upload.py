"""Uploads: whole or not taken for whole, gone on with, verified, and never over something else."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from llmtune.errors import ExportError, MissingPrerequisiteError
from llmtune.export.publish.folder import write_export
from llmtune.export.publish.upload import UPLOADING, check_upload, upload_export
from llmtune.storage import remote
from llmtune.storage.manifest import check_undamaged, is_complete
from tests.support import run


class FlakyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """A network that fails when it is told to, damages what it is told to, and remembers what was
    written.
    """

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    written: ClassVar[list[str]] = []
    working_writes: ClassVar[int | None] = None
    damage: ClassVar[int] = 0

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(
            MemoryFileSystem._strip_protocol(str(path).removeprefix("flaky://").rpartition("@")[2])
        )

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        cls = type(self)
        if "w" not in mode:
            return super()._open(path, mode, **kwargs)
        if cls.working_writes is not None:
            if cls.working_writes <= 0:
                raise ConnectionResetError(f"reset while writing flaky://me:hunter2@host{path}")
            cls.working_writes -= 1
        cls.written.append(path.rpartition("/")[2])
        file = DamagedFile(self, path) if cls.damage else MemoryFile(self, path, kwargs.get("data"))
        cls.damage = max(0, cls.damage - 1)
        self.store[path] = file
        return file


class DamagedFile(MemoryFile):  # type: ignore[misc]
    """What arrives with a flipped bit."""

    def write(self, data: Any) -> int:
        return int(super().write(bytes([data[0] ^ 1]) + bytes(data[1:])))


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty stores, and retries that do not wait a second each."""
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)
    for system in (FlakyFileSystem, MemoryFileSystem):
        system.store.clear()
        system.pseudo_dirs[:] = [""]
    FlakyFileSystem.written.clear()
    FlakyFileSystem.working_writes = None
    FlakyFileSystem.damage = 0
    os.environ.pop("HF_TOKEN", None)


FILES = {
    "config.json": b"{}",
    "model-1.safetensors": b"\1" * 5000,
    "model-2.safetensors": b"\2" * 5000,
    "sub/x.json": b"1",
}


def make_export(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    def write(aside: Path, _journal: Any) -> None:
        for name, data in files.items():
            (aside / name).parent.mkdir(exist_ok=True)
            (aside / name).write_bytes(data)

    write_export(folder, "job", write, {"base": "tiny", "format": "safetensors", "source": ""})
    return folder


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return make_export(tmp_path / "export")


def upload(folder: Path, url: str, dry_run: bool = False) -> list[str]:
    said: list[str] = []
    upload_export(folder, url, True, dry_run, said.append)
    return said


def contents(url: str) -> dict[str, bytes]:
    system, root = fsspec.url_to_fs(url)
    found = system.find(root)
    return {path.removeprefix(root).lstrip("/"): system.cat_file(path) for path in found}


def local_contents(folder: Path) -> dict[str, bytes]:
    return {
        f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()
    }


def test_a_folder_arrives_as_it_is(export: Path, tmp_path: Path) -> None:
    upload(export, "memory://models/tiny")
    assert contents("memory://models/tiny") == local_contents(export)
    upload(export, f"file://{tmp_path}/other/place")
    assert local_contents(tmp_path / "other" / "place") == local_contents(export)
    assert is_complete(tmp_path / "other" / "place")
    check_undamaged(tmp_path / "other" / "place")


def test_the_marker_comes_last_and_a_second_upload_sends_nothing(export: Path) -> None:
    upload(export, "flaky://models/tiny")
    written = list(FlakyFileSystem.written)
    assert written[0] == UPLOADING
    assert written[-2:] == ["manifest.json", "COMPLETE"]
    said = upload(export, "flaky://models/tiny/")
    assert written == FlakyFileSystem.written
    assert "holds this export already" in said[-1]


@pytest.mark.parametrize("working", range(7))
def test_an_interrupted_upload_is_not_taken_for_whole_and_goes_on(
    export: Path, working: int
) -> None:
    """Cut off after each of the seven files that are written."""
    url = "flaky://models/tiny"
    FlakyFileSystem.working_writes = working
    with pytest.raises(ExportError, match="run the same command again") as caught:
        upload(export, url)
    assert caught.value.exit_code == 6
    assert "hunter2" not in str(caught.value)
    before = contents(url)
    assert "COMPLETE" not in before
    FlakyFileSystem.working_writes = None
    FlakyFileSystem.written.clear()
    upload(export, url)
    assert contents(url) == local_contents(export)
    # What is whole there is not sent again.
    sent = {name for name in FlakyFileSystem.written if name.endswith(".safetensors")}
    assert sent == {name for name in FILES if name.endswith(".safetensors")} - before.keys()


def test_a_failing_network_is_tried_again_and_damage_on_the_way_is_found(export: Path) -> None:
    FlakyFileSystem.damage = 2
    upload(export, "flaky://models/tiny")
    assert contents("flaky://models/tiny") == local_contents(export)
    FlakyFileSystem.store.clear()
    FlakyFileSystem.damage = 1000
    with pytest.raises(ExportError, match="reads back with other contents"):
        upload(export, "flaky://models/tiny")
    assert "COMPLETE" not in contents("flaky://models/tiny")


@pytest.mark.parametrize("data", [b"\7" * 5000, b"\2" * 4999])
def test_a_file_that_changed_there_is_sent_again(export: Path, data: bytes) -> None:
    upload(export, "flaky://models/tiny")
    FlakyFileSystem().pipe_file("/models/tiny/model-2.safetensors", data)
    FlakyFileSystem.written.clear()
    upload(export, "flaky://models/tiny")
    assert [name for name in FlakyFileSystem.written if name in FILES] == ["model-2.safetensors"]
    assert contents("flaky://models/tiny") == local_contents(export)


def test_another_export_replaces_the_first_without_leaving_its_files(
    export: Path, tmp_path: Path
) -> None:
    url = "flaky://models/tiny"
    upload(export, url)
    FlakyFileSystem().pipe_file("/models/tiny/notes.txt", b"of a person's")
    other = make_export(tmp_path / "other", {"config.json": b"{}", "model.gguf": b"\3" * 77})
    # Cut off after the first export's manifest has gone: its files are still known.
    FlakyFileSystem.working_writes = 1
    with pytest.raises(ExportError):
        upload(other, url)
    FlakyFileSystem.working_writes = None
    upload(other, url)
    assert contents(url) == {**local_contents(other), "notes.txt": b"of a person's"}


def test_something_else_is_never_written_over(export: Path, tmp_path: Path) -> None:
    place = tmp_path / "thesis"
    place.mkdir()
    (place / "config.json").write_text("precious")
    with pytest.raises(ExportError, match="holds config.json, which is no export of llmtune"):
        upload(export, f"file://{place}")
    assert local_contents(place) == {"config.json": b"precious"}
    # A checkpoint has a manifest, too, but it names no format.
    MemoryFileSystem().pipe_file(
        "/run/checkpoint-5/manifest.json", json.dumps({"files": {}, "step": 5}).encode()
    )
    with pytest.raises(ExportError, match="no export"):
        upload(export, "memory://run/checkpoint-5")
    # A manifest that names files outside its folder is none of ours either.
    bad = {"format": "safetensors", "files": {"../../thesis": {"size": 1, "xxh3_128": ""}}}
    MemoryFileSystem().pipe_file("/evil/manifest.json", json.dumps(bad).encode())
    with pytest.raises(ExportError, match="thesis"):
        upload(export, "memory://evil")
    assert list(contents("memory://evil")) == ["manifest.json"]


def test_an_empty_folder_may_be_filled_but_not_the_export_itself(
    export: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    upload(export, f"file://{tmp_path}/empty")
    assert is_complete(tmp_path / "empty")
    for inside in (export, export / "copy"):
        with pytest.raises(ExportError, match="which is what would be copied"):
            upload(export, f"file://{inside}")
    check_undamaged(export)


def test_a_damaged_or_unfinished_export_is_not_uploaded(export: Path, tmp_path: Path) -> None:
    (export / "model-1.safetensors").write_bytes(b"\7" * 5000)
    with pytest.raises(ExportError, match=r"nothing was sent: .*model-1.safetensors"):
        upload(export, "memory://models/tiny")
    (export / "COMPLETE").unlink()
    with pytest.raises(ExportError, match="never finished"):
        upload(export, "memory://models/tiny")
    assert contents("memory://models") == {}


def test_a_dry_run_lists_and_touches_nothing(export: Path, tmp_path: Path) -> None:
    said = "\n".join(upload(export, f"file://{tmp_path}/place", dry_run=True))
    assert f"file://{tmp_path}/place: 6 files" in said
    assert "model-1.safetensors  5.0 kB" in said
    assert not (tmp_path / "place").exists()
    said = "\n".join(upload(export, "hf://user/name", dry_run=True))
    assert "hf://user/name (private, if it has to be made): 6 files" in said
    assert "once it is written" in upload(tmp_path / "none", "flaky://x/y", dry_run=True)[0]
    assert contents("flaky://x") == {}


@pytest.mark.parametrize(
    ("url", "error", "part"),
    [
        ("hf://name", ExportError, "hf://user/name@branch"),
        ("hf://datasets/user/name", ExportError, "hf://user/name@branch"),
        ("hf://datasets/name", ExportError, "hf://user/name@branch"),
        ("hf://user/name", MissingPrerequisiteError, "HF_TOKEN is not set"),
        ("nonsense://x", ExportError, "nonsense:// is not known"),
        ("memory://", ExportError, "names no folder"),
        ("sftp://me:hunter2@host/place", MissingPrerequisiteError, "paramiko"),
        ("gs://bucket/place", MissingPrerequisiteError, "pip install gcsfs"),
    ],
)
def test_an_address_that_cannot_work_is_refused_at_once(
    url: str, error: type[Exception], part: str
) -> None:
    with pytest.raises(error, match=part) as caught:
        check_upload(url)
    assert "hunter2" not in str(caught.value)


TOKEN = "hf_abcdefghijklmnop0123"


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload talks to: small files only, each commit a snapshot."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.commits: list[dict[str, bytes]] = []
        self.private: bool | None = None
        self.tokens: set[str | None] = set()
        self.failures: list[int] = []
        self.damage = False

    def oid(self, number: int) -> str:
        return hashlib.sha1(str(number).encode()).hexdigest()


class HubHandler(BaseHTTPRequestHandler):
    """Answers in the hub's own terms."""

    server: Hub

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def answer(self, data: Any, status: int = 200, **headers: str) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.tokens.add(self.headers["Authorization"])
        files = hub.commits[-1] if hub.commits else {}
        if "/tree/" in path:
            entries = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(data),
                    "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
                }
                for name, data in files.items()
            ]
            return self.answer(entries)
        if "/resolve/" in path:
            data = files[path.rpartition("/")[2]]
            oid = hub.oid(len(hub.commits))
            return self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=oid)
        if path.startswith("/api/models/"):
            about = {"id": "user/name", "sha": hub.oid(len(hub.commits)), "private": hub.private}
            return self.answer(about)
        return self.answer({"error": f"no answer for {path}"}, 500)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.tokens.add(self.headers["Authorization"])
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if hub.failures and ("/commit/" in path or hub.failures[0] == 403):
            return self.answer({"error": "not now"}, hub.failures.pop(0))
        if path == "/api/repos/create":
            if hub.private is not None:
                return self.answer(
                    {"error": "exists", "url": f"http://{self.headers['Host']}/user/name"}, 409
                )
            asked = json.loads(body)
            hub.private = asked.get("private", asked.get("visibility") == "private")
            hub.commits.append({".gitattributes": b"*.safetensors filter=lfs"})
            return self.answer({"url": f"http://{self.headers['Host']}/user/name"})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return self.answer(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in files
                    ]
                }
            )
        if "/commit/" in path:
            files = dict(hub.commits[-1])
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
                elif line["key"] == "header":
                    assert value["parentCommit"] == hub.oid(len(hub.commits))
            if hub.damage:
                files["model-1.safetensors"] = b"\0" * 5000
            hub.commits.append(files)
            oid = hub.oid(len(hub.commits))
            return self.answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/user/name/commit/{oid}",
                    "commitOid": oid,
                    "success": True,
                }
            )
        return self.answer({"valid": True, "warnings": [], "errors": []} if "yaml" in path else {})


@pytest.fixture
def hub() -> Iterator[Hub]:
    """The server, in a thread."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def upload_in_process(folder: Path, hub: Hub, url: str = "hf://user/name", **env: str) -> str:
    """Both outputs and the error, if there was one, of an upload in a process of its own."""
    code = (
        "import sys, pathlib\n"
        "from llmtune.storage import remote\n"
        "from llmtune.errors import LlmtuneError\n"
        "from llmtune.export.publish.upload import upload_export\n"
        "remote.FIRST_WAIT_SECONDS = 0.01\n"
        "try:\n"
        f"    upload_export(pathlib.Path({str(folder)!r}), {url!r}, True, False, print)\n"
        "except LlmtuneError as error:\n"
        "    print('ERROR', error.exit_code, error)\n"
    )
    where = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        **env,
    }
    done = run(
        [sys.executable, "-c", code],
        env={**where, "HF_HOME": str(folder.parent / "hf")},
        timeout=120,
    )
    assert done.code == 0, done.err
    text = done.out + done.err
    assert TOKEN not in text
    return text


@pytest.mark.process
def test_the_hub_gets_everything_in_one_commit_into_a_private_repository(
    hub: Hub, export: Path
) -> None:
    text = upload_in_process(export, hub)
    assert "uploaded 6 files to hf://user/name in one commit" in text, text
    assert hub.private is True
    assert len(hub.commits) == 2
    assert hub.commits[-1] == {
        ".gitattributes": b"*.safetensors filter=lfs",
        **local_contents(export),
    }
    assert hub.tokens <= {f"Bearer {TOKEN}", None}
    assert f"Bearer {TOKEN}" in hub.tokens
    assert "holds this export already" in upload_in_process(export, hub)
    assert len(hub.commits) == 2


@pytest.mark.process
def test_on_the_hub_another_export_replaces_the_first(
    hub: Hub, export: Path, tmp_path: Path
) -> None:
    upload_in_process(export, hub)
    other = make_export(tmp_path / "other", {"config.json": b"{}", "model.gguf": b"\3" * 77})
    upload_in_process(other, hub, "hf://user/name@v2")
    assert hub.commits[-1] == {
        ".gitattributes": b"*.safetensors filter=lfs",
        **local_contents(other),
    }


@pytest.mark.process
def test_a_repository_of_something_else_is_refused(hub: Hub, export: Path) -> None:
    hub.private = False
    hub.commits.append({"config.json": b"precious"})
    text = upload_in_process(export, hub)
    assert "was there before and is public" in text
    assert (
        "ERROR 6 export.upload=hf://user/name: holds config.json, which is no export of llmtune"
        in text
    )
    assert len(hub.commits) == 1


@pytest.mark.process
def test_the_hub_is_tried_again_unless_it_says_no(hub: Hub, export: Path) -> None:
    hub.failures = [500, 500]
    assert "in one commit" in upload_in_process(export, hub)
    assert not hub.failures
    del hub.commits[-1]["config.json"]
    hub.failures = [403] * 20
    text = upload_in_process(export, hub)
    assert "ERROR 6" in text
    assert "right to write to user/name" in text
    assert len(hub.failures) >= 18, "a refusal is not tried again"


@pytest.mark.process
def test_what_arrives_damaged_on_the_hub_is_an_error(hub: Hub, export: Path) -> None:
    hub.damage = True
    assert "model-1.safetensors arrived with other contents" in upload_in_process(export, hub)


@pytest.mark.process
def test_without_a_network_the_error_says_so(hub: Hub, export: Path) -> None:
    assert "HF_HUB_OFFLINE is set" in upload_in_process(export, hub, HF_HUB_OFFLINE="1")
    text = upload_in_process(export, hub, HF_ENDPOINT="http://127.0.0.1:9")
    assert "ERROR 6" in text
    assert "run the same command again" in text

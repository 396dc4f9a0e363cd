"""Two runs of one name at one mirror leave each other's checkpoints alone."""

from __future__ import annotations

import uuid
from pathlib import Path

import fsspec
import pytest

from llmtune.checkpoint.mirror import Mirror, read_place
from llmtune.storage import layout
from llmtune.storage.hashing import hash_file
from llmtune.storage.manifest import mark_complete, write_manifest

TIMEOUT = 30


def make_checkpoint(run: Path, step: int, contents: str) -> Path:
    folder = layout.checkpoint_folder(run, step)
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_text(contents)
    write_manifest(
        folder,
        {"adapter_model.safetensors": hash_file(folder / "adapter_model.safetensors")},
        {"step": step},
    )
    mark_complete(folder)
    return folder


def contents_of(url: str) -> dict[str, bytes]:
    system, path = fsspec.core.url_to_fs(url)
    return {str(name): system.cat_file(name) for name in system.find(path)}


@pytest.mark.parametrize("step", [5, 6], ids=["the same step", "another step"])
def test_the_second_run_writes_and_removes_nothing(step: int, tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    first = Mirror(url, "r", lambda _: None, run_id="first")
    first.put(make_checkpoint(tmp_path / "first", 5, "of the first"), None)
    assert first.finish(TIMEOUT) == []
    before = contents_of(url)
    assert read_place(url, "r") == ("first", ["checkpoint-5"])

    said: list[str] = []
    second = Mirror(url, "r", said.append, run_id="second")
    folder = make_checkpoint(tmp_path / "second", step, "of the second")
    # Nothing but its own is to be kept.
    second.put(folder, {folder.name})
    ((name, reason),) = second.finish(TIMEOUT)
    assert name == folder.name
    assert "belongs to another run; take another run_name= or checkpoint.mirror=" in reason
    assert contents_of(url) == before

    # The first goes on, and under another name so does the second.
    again = Mirror(url, "r", lambda _: None, run_id="first")
    again.put(make_checkpoint(tmp_path / "first", 7, "later"), {"checkpoint-7"})
    other = Mirror(url, "r2", lambda _: None, run_id="second")
    other.put(folder, None)
    assert again.finish(TIMEOUT) == other.finish(TIMEOUT) == []
    assert read_place(url, "r") == ("first", ["checkpoint-7"])
    assert read_place(url, "r2") == ("second", [folder.name])
